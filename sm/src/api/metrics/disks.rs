//! The families of attached disks.
//!
//! Every sample names its SR and its disk by uuid; the names people gave them
//! stand in `coppice_vdi_info` alone, so that a rename begins no new series of
//! everything. A disk whose tapdisk does not answer has `coppice_vdi_up` 0 and
//! a state, and nothing else: figures of a while ago would look like now.

use tapdisk_control::{KindStats, Stats};
use uuid::Uuid;
use vhd::units::BLOCK_BYTES;

use super::page::{Kind, Page};
use crate::api::figures::{Asked, Figures};

const MICROS: f64 = 1e6;
/// Upper bounds of the buckets of latencies, as powers of two of a
/// microsecond: 16 us, then each four times the last, up to 17 s. A bound of
/// the tapdisk's own finer buckets, so nothing is guessed.
const BOUNDS_LOG2_US: [u32; 11] = [4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24];
/// What a tapdisk can be, the first word of the state that it says; `silent`
/// when it says nothing, `down` when there is none.
const STATES: [&str; 7] = ["running", "draining", "paused", "stuck", "failed", "silent", "down"];

/// A disk as samples name it.
struct Named {
    sr: String,
    vdi: String,
    disk: Asked,
    figures: Figures,
}

impl Named {
    fn labels(&self) -> [(&str, &str); 2] {
        [("sr", &self.sr), ("vdi", &self.vdi)]
    }

    fn with<'a>(&'a self, label: &'a str, value: &'a str) -> [(&'a str, &'a str); 3] {
        let [sr, vdi] = self.labels();
        [sr, vdi, (label, value)]
    }

    fn stats(&self) -> Option<&Stats> {
        match &self.figures {
            Figures::Told(stats) => Some(stats),
            Figures::Silent | Figures::Down => None,
        }
    }

    fn state(&self) -> &str {
        match &self.figures {
            Figures::Told(stats) => stats.state.split(':').next().unwrap_or_default(),
            Figures::Silent => "silent",
            Figures::Down => "down",
        }
    }
}

/// The kinds of requests by name.
fn kinds(stats: &Stats) -> [(&'static str, &KindStats); 7] {
    [
        ("read", &stats.read),
        ("write", &stats.write),
        ("flush", &stats.flush),
        ("trim", &stats.trim),
        ("write_zeroes", &stats.write_zeroes),
        ("block_status", &stats.block_status),
        ("cache", &stats.cache),
    ]
}

/// Writes all of it.
pub(super) fn write(page: &mut Page, names: &dyn Fn(Uuid) -> String, asked: Vec<(Asked, Figures)>) {
    let named = |(disk, figures): (Asked, Figures)| Named {
        sr: disk.sr.to_string(),
        vdi: disk.vdi.to_string(),
        disk,
        figures,
    };
    let disks: Vec<Named> = asked.into_iter().map(named).collect();
    states(page, names, &disks);
    requests(page, &disks);
    latencies(page, &disks);
    gauges(page, &disks);
    counters(page, &disks);
}

fn states(page: &mut Page, names: &dyn Fn(Uuid) -> String, disks: &[Named]) {
    let mut info = page.family(Kind::Gauge, "coppice_vdi_info", "Attached disks and what they are called.");
    for named in disks {
        let [sr, vdi] = named.labels();
        let (sr_name, read_only) = (names(named.disk.sr), named.disk.read_only.to_string());
        let words = [("sr_name", &*sr_name), ("name", &named.disk.name), ("read_only", &read_only)];
        info.sample(&[[sr, vdi].as_slice(), &words].concat(), 1);
    }
    let help = "Whether the disk's tapdisk answered; if not, it has no other figures.";
    let mut up = page.family(Kind::Gauge, "coppice_vdi_up", help);
    for named in disks {
        up.sample(&named.labels(), u8::from(named.stats().is_some()));
    }
    let help = "How the disk's tapdisk is: 1 for the state it is in; silent: it does not answer.";
    let mut state = page.family(Kind::Gauge, "coppice_vdi_tapdisk_state", help);
    for named in disks {
        for each in STATES {
            state.sample(&named.with("state", each), u8::from(named.state() == each));
        }
    }
}

fn requests(page: &mut Page, disks: &[Named]) {
    let mut of_kinds = |name: &str, help: &str, value: &dyn Fn(&KindStats) -> u64| {
        let mut family = page.family(Kind::Counter, name, help);
        for named in disks {
            for (kind, figures) in named.stats().map(kinds).into_iter().flatten() {
                family.sample(&named.with("kind", kind), value(figures));
            }
        }
    };
    of_kinds("coppice_vdi_requests_total", "Guest requests answered.", &|kind| kind.count);
    of_kinds("coppice_vdi_request_errors_total", "Of these, with an error.", &|kind| kind.errors);
    of_kinds("coppice_vdi_request_bytes_total", "Bytes these were about.", &|kind| kind.bytes);
}

fn latencies(page: &mut Page, disks: &[Named]) {
    let help = "From a guest request's arrival to its answer.";
    let mut family = page.family(Kind::Histogram, "coppice_vdi_request_duration_seconds", help);
    for named in disks {
        for (kind, figures) in named.stats().map(kinds).into_iter().flatten() {
            let [sr, vdi, kind] = named.with("kind", kind);
            for log2_us in BOUNDS_LOG2_US {
                let bound_us = 1 << log2_us;
                let bound = (bound_us as f64 / MICROS).to_string();
                let below = figures.latency.count_below_us(bound_us);
                family.suffixed("_bucket", &[sr, vdi, kind, ("le", &bound)], below);
            }
            let count = figures.latency.count();
            family.suffixed("_bucket", &[sr, vdi, kind, ("le", "+Inf")], count);
            family.suffixed("_sum", &[sr, vdi, kind], figures.total_us as f64 / MICROS);
            family.suffixed("_count", &[sr, vdi, kind], count);
        }
    }
    let help = "The longest of these times since the tapdisk started.";
    let mut family = page.family(Kind::Gauge, "coppice_vdi_longest_request_seconds", help);
    for named in disks {
        for (kind, figures) in named.stats().map(kinds).into_iter().flatten() {
            family.sample(&named.with("kind", kind), figures.longest_us as f64 / MICROS);
        }
    }
}

fn gauges(page: &mut Page, disks: &[Named]) {
    let mut gauge = |name: &str, help: &str, value: &dyn Fn(&Stats) -> f64| {
        let mut family = page.family(Kind::Gauge, name, help);
        for named in disks {
            if let Some(stats) = named.stats() {
                family.sample(&named.labels(), value(stats));
            }
        }
    };
    let seconds = |us: u64| us as f64 / MICROS;
    gauge("coppice_vdi_clients", "NBD clients connected.", &|s| s.clients as f64);
    gauge("coppice_vdi_queue_depth", "Guest requests not answered yet.", &|s| s.in_flight as f64);
    gauge("coppice_vdi_queue_depth_max", "The most there ever were.", &|s| s.in_flight_max as f64);
    gauge("coppice_vdi_held_requests", "Of these, held by a pause or a drain.", &|s| s.held as f64);
    gauge("coppice_vdi_volume_operations", "Operations on images under way.", &|s| s.operations as f64);
    gauge("coppice_vdi_chain_depth", "Images in the chain; 1: no parent.", &|s| s.depth as f64);
    gauge("coppice_vdi_virtual_size_bytes", "Size of the disk.", &|s| s.virtual_bytes as f64);
    gauge("coppice_vdi_leaf_blocks_bytes", "Blocks that the leaf holds.", &|s| {
        s.leaf_blocks.saturating_mul(BLOCK_BYTES) as f64
    });
    gauge("coppice_vdi_buffer_bytes", "Memory in use for guest data.", &|s| s.buffer_bytes as f64);
    let help = "Changes that wait for a flush in the pending record.";
    gauge("coppice_vdi_pending_record_entries", help, &|s| s.record_entries as f64);
    let help = "How long requests were held at the last pause or drain.";
    gauge("coppice_vdi_last_pause_seconds", help, &|s| seconds(s.last_pause_us));
    let help = "The longest time they were held.";
    gauge("coppice_vdi_longest_pause_seconds", help, &|s| seconds(s.longest_pause_us));
    let help = "Blocks in the cache of who owns which sectors.";
    gauge("coppice_vdi_owner_cache_blocks", help, &|s| s.owners.blocks as f64);
    gauge("coppice_vdi_owner_cache_runs", "Runs of sectors in that cache.", &|s| s.owners.runs as f64);
    let help = "Memory that cache takes.";
    gauge("coppice_vdi_owner_cache_bytes", help, &|s| s.owners.bytes as f64);
    let help = "The most it may take.";
    gauge("coppice_vdi_owner_cache_max_bytes", help, &|s| s.owners.bytes_max as f64);
}

fn counters(page: &mut Page, disks: &[Named]) {
    let mut counter = |name: &str, help: &str, value: &dyn Fn(&Stats) -> u64| {
        let mut family = page.family(Kind::Counter, name, help);
        for named in disks {
            if let Some(stats) = named.stats() {
                family.sample(&named.labels(), value(stats));
            }
        }
    };
    let help = "Lookups in the cache of owners that found their block.";
    counter("coppice_vdi_owner_cache_hits_total", help, &|s| s.owners.hits);
    let help = "Lookups in the cache of owners for which bitmaps were read.";
    counter("coppice_vdi_owner_cache_misses_total", help, &|s| s.owners.misses);
}
