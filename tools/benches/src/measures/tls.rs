//! 1 MiB requests one after another, QD 8, reading over TCP: what TLS costs.
//!
//! The client is nbdcopy, for ours has no TLS and fio is not let near a file
//! of keys; it is the same for both, and works on the same processors as the
//! server.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use uuid::Uuid;

use crate::bench::{Bench, Contender, Round, compare, have, miss};
use crate::images::Fill;
use crate::procs::{EXPORT, Server, Tool, nbdcopy};
use crate::report::{Floor, Report};

const REQUEST_BYTES: u32 = 1 << 20;
const DEPTH: usize = 8;
const MEASURE: &str = "sequential read over TCP, 1 MiB, QD 8: with TLS to without";
const USER: &str = "bench";

pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    if !have(report, MEASURE, &[Tool::Nbdcopy]) {
        return Ok(());
    }
    let image = bench.images.image("tls.vhd", bench.size_bytes, Fill::Level(0), None)?;
    let keys = bench.images.run_folder().join("keys.psk");
    new_key(&keys)?;
    let listening = |more: &[&OsStr]| {
        // Two at one image: neither may write.
        let all = ["--read-only", "--listen", "127.0.0.1:0"].map(OsStr::new);
        Server::tapdisk(&bench.tap, &bench.images, &image, &[&all, more].concat())
    };
    let plain = listening(&[])?;
    let secured = listening(&[OsStr::new("--tls-psk"), keys.as_os_str()])?;
    let contenders = [
        ("TCP", format!("nbd://{}/{EXPORT}", plain.tcp_address()?)),
        ("TLS", format!("nbds://{USER}@{}/{EXPORT}?tls-psk-file={}", secured.tcp_address()?, keys.display())),
    ];
    let read = |uri: &str| nbdcopy(uri, bench.size_bytes, REQUEST_BYTES, DEPTH);
    // Whether a client gets in at all; and neither is the first to read.
    for (name, uri) in &contenders {
        if let Err(error) = read(uri) {
            miss(report, MEASURE, format!("{name}: {error:#}"));
            return bench.images.remove(&image);
        }
    }
    let contenders = contenders.into_iter().map(|(name, uri)| {
        Contender::new(name, move |_| Ok(Round { rate: read(&uri)?, ..Round::default() }))
    });
    let results = bench.interleave(contenders.collect())?;
    let mib_s = |name: &str| results.of(name).map(|rounds| rounds.mib_s(REQUEST_BYTES));
    compare(report, MEASURE, "MiB/s", mib_s("TLS"), mib_s("TCP"), Floor::None);
    drop((plain, secured));
    bench.images.remove(&image)
}

/// A file with one key, for both sides.
fn new_key(path: &Path) -> Result<()> {
    let key: String = [Uuid::new_v4(), Uuid::new_v4()].map(|part| part.simple().to_string()).concat();
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.with_context(|| path.display().to_string())?;
    Ok(writeln!(file, "{USER}:{key}")?)
}
