//! What smd tells Prometheus of attached disks, also while a tapdisk hangs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use coppice::nbd_client::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tapdisk_control::Client as Control;

use crate::support::host::{Attached, Daemon, Host, wait_until};

/// Longest wait for an answer of a disk.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Far above what the page may take, and far below what an operation on a
/// tapdisk that hangs does.
const PAGE_LIMIT: Duration = Duration::from_secs(20);
/// Callers that wait for a process that hangs, before no more can.
const CALLERS_MAX: usize = 100_000;

/// Samples by name and labels; checks what the format asks for.
fn samples(page: &str) -> BTreeMap<String, f64> {
    let (mut samples, mut families) = (BTreeMap::new(), BTreeSet::new());
    let (mut family, mut kind) = ("", "");
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split(' ').next().unwrap();
            assert!(families.insert(family), "{family} is told twice");
            continue;
        }
        if let Some(told) = line.strip_prefix("# TYPE ") {
            kind = told.strip_prefix(family).unwrap().trim();
            assert_eq!(kind == "counter", family.ends_with("_total"), "{line}");
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let name = series.split('{').next().unwrap();
        let parts: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        assert!(name.strip_prefix(family).is_some_and(|part| parts.contains(&part)), "{line} in {family}");
        assert_eq!(samples.insert(series.to_owned(), value.parse().unwrap()), None, "{line}");
    }
    samples
}

/// The page, in time.
fn scraped(host: &Host) -> BTreeMap<String, f64> {
    let begun = Instant::now();
    let page = host.metrics(Daemon::Smd);
    assert!(begun.elapsed() < PAGE_LIMIT, "the page took {:?}", begun.elapsed());
    samples(&page)
}

/// A page on which these disks are told of. On a loaded machine a tapdisk that
/// is well may miss a page, never all of them.
fn page_of(host: &Host, disks: &[&Disk]) -> BTreeMap<String, f64> {
    let mut page = BTreeMap::new();
    wait_until("all that are well to be told of", || {
        page = scraped(host);
        disks.iter().all(|disk| disk.value(&page, "coppice_vdi_up", "") == Some(1.0))
    });
    page
}

struct Disk {
    sr: String,
    vdi: String,
    at: Attached,
}

impl Disk {
    fn value(&self, page: &BTreeMap<String, f64>, name: &str, more: &str) -> Option<f64> {
        page.get(&format!("{name}{{sr=\"{}\",vdi=\"{}\"{more}}}", self.sr, self.vdi)).copied()
    }

    /// Writes some, and reads them once more.
    fn use_it(&self, requests: u64) {
        let mut client = Client::connect(&self.at.socket, &self.at.export).unwrap();
        for n in 0..requests {
            client.write(n * 4096, &[7; 4096], false).unwrap();
            client.next(ANSWER_LIMIT).unwrap().outcome.unwrap();
        }
        client.read(0, 4096).unwrap();
        client.next(ANSWER_LIMIT).unwrap().outcome.unwrap();
        client.close();
    }

    fn assert_told(&self, page: &BTreeMap<String, f64>, written: u64) {
        let told = |name: &str, more: &str| {
            self.value(page, name, more).unwrap_or_else(|| panic!("{name} of {} is missing", self.vdi))
        };
        assert_eq!(told("coppice_vdi_up", ""), 1.0);
        assert_eq!(told("coppice_vdi_tapdisk_state", ",state=\"running\""), 1.0);
        assert_eq!(told("coppice_vdi_tapdisk_state", ",state=\"silent\""), 0.0);
        let written = written as f64;
        assert_eq!(told("coppice_vdi_requests_total", ",kind=\"write\""), written);
        assert_eq!(told("coppice_vdi_request_bytes_total", ",kind=\"write\""), written * 4096.0);
        assert_eq!(told("coppice_vdi_request_errors_total", ",kind=\"write\""), 0.0);
        assert_eq!(told("coppice_vdi_requests_total", ",kind=\"read\""), 1.0);
        assert_eq!(told("coppice_vdi_chain_depth", ""), 1.0);
        assert_eq!(told("coppice_vdi_virtual_size_bytes", ""), (8 << 20) as f64);
        self.assert_spread(page, "write", written);
    }

    /// Buckets hold all that are in smaller ones, and the last one all.
    fn assert_spread(&self, page: &BTreeMap<String, f64>, kind: &str, count: f64) {
        let name = "coppice_vdi_request_duration_seconds";
        let more = format!(",kind=\"{kind}\"");
        let bucket = format!("{name}_bucket{{sr=\"{}\",vdi=\"{}\"{more},le=\"", self.sr, self.vdi);
        let mut spread: Vec<(f64, f64)> = page
            .iter()
            .filter_map(|(series, count)| {
                let bound = series.strip_prefix(&bucket)?.strip_suffix("\"}")?;
                Some((bound.parse().unwrap(), *count))
            })
            .collect();
        spread.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(spread.len() > 8 && spread.windows(2).all(|two| two[0].1 <= two[1].1), "{spread:?}");
        assert_eq!(spread.last().copied(), Some((f64::INFINITY, count)));
        assert_eq!(self.value(page, &format!("{name}_count"), &more), Some(count));
        let sum = self.value(page, &format!("{name}_sum"), &more).unwrap();
        assert!((sum > 0.0) == (count > 0.0), "{sum}");
    }

    fn assert_silent(&self, page: &BTreeMap<String, f64>) {
        assert_eq!(self.value(page, "coppice_vdi_up", ""), Some(0.0));
        assert_eq!(self.value(page, "coppice_vdi_tapdisk_state", ",state=\"silent\""), Some(1.0));
        assert_eq!(self.value(page, "coppice_vdi_tapdisk_state", ",state=\"running\""), Some(0.0));
        assert_eq!(self.value(page, "coppice_vdi_requests_total", ",kind=\"write\""), None);
    }
}

#[test]
fn a_tapdisk_that_hangs_takes_no_figures_of_others_from_the_page() {
    let host = Host::new();
    host.sr("store");
    let sr = host.ok(&["sr", "show", "store"])["uuid"].as_str().unwrap().to_owned();
    let disk = |name: &str| {
        let vdi = host.disk("store", name, "8MiB");
        let at = host.attach(&vdi);
        Disk { sr: sr.clone(), vdi, at }
    };
    let [web, odd, stuck] = ["web", r#"a "b\c"#, "stuck"].map(disk);
    web.use_it(12);
    odd.use_it(3);
    stuck.use_it(5);
    let page = page_of(&host, &[&web, &odd, &stuck]);
    [(&web, 12), (&odd, 3), (&stuck, 5)].into_iter().for_each(|(disk, written)| {
        disk.assert_told(&page, written);
    });
    let words = r#",sr_name="store",name="a \"b\\c",read_only="false""#;
    assert_eq!(odd.value(&page, "coppice_vdi_info", words), Some(1.0));

    let pid = Pid::from_raw(stuck.at.pid);
    kill(pid, Signal::SIGSTOP).unwrap();
    let page = page_of(&host, &[&web]);
    stuck.assert_silent(&page);
    web.assert_told(&page, 12);
    let shown = host.ok(&["vdi", "show", "stuck"]);
    assert!(shown["trouble"].as_str().unwrap().contains("did not answer"), "{shown}");
    wait_until("nothing to be wrong with the other", || {
        host.ok(&["vdi", "show", "web"])["trouble"].is_null()
    });
    wait_until("that disk alone to be in trouble", || {
        let status = host.ok(&["status"]);
        let troubled = status["smd"]["status"]["troubled"].as_array().unwrap();
        troubled.len() == 1 && troubled[0]["name"] == "stuck"
    });
    // It has hung for so long that nobody can even ask any more.
    let control = stuck.at.socket.with_file_name("ctl.sock");
    let mut callers = Vec::new();
    while let Ok(caller) = Control::connect(&control, Duration::from_millis(100)) {
        callers.push(caller);
        assert!(callers.len() < CALLERS_MAX, "the queue of callers has no end");
    }
    let page = page_of(&host, &[&odd]);
    stuck.assert_silent(&page);
    odd.assert_told(&page, 3);
    drop(callers);
    kill(pid, Signal::SIGCONT).unwrap();
    stuck.assert_told(&page_of(&host, &[&stuck]), 5);
    // One that is not attached is not told of.
    host.ok(&["vdi", "detach", "web"]);
    assert_eq!(web.value(&scraped(&host), "coppice_vdi_up", ""), None);
}
