//! Content receipts with real daemons: guests that write, disks that come and
//! go, processes that die, and damage behind a merge.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coppice::nbd_client::Client;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::support::host::{Attached, Daemon, Host, wait_until};

const BLOCK_BYTES: u64 = 2 << 20;
const PIECE_BYTES: usize = 256 << 10;
const ANSWER: Duration = Duration::from_secs(60);

fn answered(client: &mut Client) {
    assert_eq!(client.next(ANSWER).unwrap().outcome, Ok(Vec::new()));
}

/// Writes a byte all over some blocks.
fn write(at: &Attached, blocks: std::ops::Range<u64>, byte: u8) {
    let mut client = Client::connect(&at.socket, &at.export).unwrap();
    for offset in (blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES).step_by(PIECE_BYTES) {
        client.write(offset, &[byte; PIECE_BYTES], false).unwrap();
        answered(&mut client);
    }
    client.flush().unwrap();
    answered(&mut client);
    client.close();
}

/// Receipts, at a pace that leaves time to do things in between.
fn ask_for_receipts(host: &Host, rate: &str) {
    host.ok(&["gc", "set", "store", "--receipts", "on", "--rate", rate]);
    let status = host.ok(&["gc", "status", "store"]);
    assert_eq!(status["srs"][0]["receipts"], true, "{status}");
}

/// base1 - base2 -+- s2 (snapshot)
///                +- d            16 blocks; base2 is to go into base1, which
/// alone has blocks 0 to 3. Collecting is paused.
struct Scene {
    host: Host,
    folder: PathBuf,
    d: String,
    s2: String,
    at: Option<Attached>,
}

impl Scene {
    fn new(attached: bool) -> Self {
        let host = Host::new();
        let folder = host.sr("store");
        let d = host.disk("store", "d", "32MiB");
        host.ok(&["gc", "pause", "store"]);
        let at = host.attach(&d);
        write(&at, 0..8, 0x11);
        host.ok(&["vdi", "snapshot", "d", "--name", "s1"]);
        write(&at, 4..8, 0x22);
        let s2 = host.ok(&["vdi", "snapshot", "d", "--name", "s2"])["uuid"].as_str().unwrap().to_owned();
        write(&at, 10..11, 0x33);
        host.ok(&["vdi", "delete", "s1"]);
        let mut at = Some(at);
        if !attached {
            host.ok(&["vdi", "detach", "d"]);
            at = None;
        }
        ask_for_receipts(&host, "8MiB");
        Self { host, folder, d, s2, at }
    }

    fn begin(&self) {
        self.host.ok(&["gc", "resume", "store"]);
    }

    /// What is said of a merge under way: nothing while it copies, something
    /// while it reads disks.
    fn merging(&self) -> Option<Option<String>> {
        let status = self.host.ok(&["gc", "status", "store"]);
        let nodes = status["srs"][0]["nodes"].as_object().unwrap();
        let node = nodes.values().find(|node| node["state"] == "merging")?;
        Some(node["reason"].as_str().map(str::to_owned))
    }

    fn until_reading(&self) {
        wait_until("a reading", || {
            self.merging().flatten().is_some_and(|reason| reason.contains("content receipt"))
        });
    }

    fn until_copying(&self) {
        wait_until("the merge itself", || self.merging() == Some(None));
    }

    /// The first merge of a kind that ended, without waiting for another try.
    fn job(&self, kind: &str) -> Value {
        job(&self.host, kind)
    }
}

fn job(host: &Host, kind: &str) -> Value {
    let mut found = None;
    wait_until("the end of a merge", || {
        let status = host.ok(&["gc", "status", "store"]);
        found = status["done"].as_array().unwrap().iter().find(|job| job["kind"] == kind).cloned();
        found.is_some()
    });
    found.unwrap()
}

/// The lines of the SR's history that say of a receipt that it is open.
fn opened(host: &Host) -> Vec<Value> {
    let history: Value = serde_json::from_str(&host.get(Daemon::Smd, "/srs/store/history")).unwrap();
    let lines = history["history"].as_array().unwrap().iter();
    let opened = lines.filter(|line| line["operation"] == "content-receipt");
    opened.map(|line| serde_json::from_str(line["detail"].as_str().unwrap()).unwrap()).collect()
}

fn of<'a>(job: &'a Value, vdi: &str) -> &'a Value {
    let disks = job["receipt"]["disks"].as_array().unwrap_or_else(|| panic!("no receipt: {job}"));
    disks.iter().find(|disk| disk["vdi"] == vdi).unwrap_or_else(|| panic!("nothing of {vdi}: {job}"))
}

/// Writes 4 KiB here and there in some blocks until told to stop.
fn busy(at: &Attached, blocks: Vec<u64>, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let at = at.clone();
    std::thread::spawn(move || {
        let mut rng = SmallRng::seed_from_u64(0xC0);
        let mut client = Client::connect(&at.socket, &at.export).unwrap();
        let mut written = 0;
        while !stop.load(Ordering::Relaxed) {
            let block = blocks[rng.random_range(0..blocks.len())];
            let offset = block * BLOCK_BYTES + rng.random_range(0..512) * 4096;
            client.write(offset, &[rng.random::<u8>() | 1; 4096], false).unwrap();
            if client.in_flight() >= 8 {
                answered(&mut client);
                written += 1;
            }
        }
        while client.in_flight() > 0 {
            answered(&mut client);
        }
        client.close();
        written
    })
}

#[test]
fn of_a_busy_disk_the_blocks_its_guest_leaves_alone_are_compared() {
    let host = Host::new();
    host.sr("store");
    let d = host.disk("store", "d", "64MiB");
    host.ok(&["gc", "pause", "store"]);
    let at = host.attach(&d);
    write(&at, 0..12, 0x11);
    host.ok(&["vdi", "snapshot", "d", "--name", "s"]);
    write(&at, 8..18, 0x22);
    host.ok(&["vdi", "delete", "s"]);
    ask_for_receipts(&host, "32MiB");
    // Blocks of the parent, of both, of the leaf, and of nobody.
    let blocks = vec![3, 9, 15, 25, 31];
    let stop = Arc::new(AtomicBool::new(false));
    let guest = busy(&at, blocks.clone(), stop.clone());
    host.ok(&["gc", "resume", "store"]);
    let job = job(&host, "leaf");
    stop.store(true, Ordering::Relaxed);
    assert!(guest.join().unwrap() > 0);
    assert_eq!(job["error"], Value::Null, "{job}");
    let receipt = of(&job, &d);
    let figure = |name: &str| receipt[name].as_u64().unwrap_or_else(|| panic!("{name}: {job}"));
    assert_eq!((receipt["verdict"].as_str(), receipt["attached"].as_bool()), (Some("same"), Some(true)));
    assert_eq!((figure("blocks"), figure("different")), (32, 0));
    assert!((1..=blocks.len() as u64).contains(&figure("written")), "{job}");
    assert_eq!(figure("matched"), 32 - figure("written"));
    // Whoever only looks on keeps nobody from detaching it.
    host.ok(&["vdi", "detach", "d"]);
    // Every hash can be had afterwards.
    let kept = host.ok(&["gc", "receipt", "store", job["job"].as_str().unwrap()]);
    let before = kept["disks"][0]["before"].as_array().unwrap();
    assert!(before.len() >= 18, "{kept}");
    assert!(before.iter().all(|entry| entry[1].as_str().unwrap().len() == 64));
    host.refused(&["gc", "receipt", "store", "none"], "NOT_FOUND");
}

#[test]
fn a_snapshot_and_a_detached_disk_are_the_same_before_and_after() {
    let scene = Scene::new(false);
    scene.begin();
    let job = scene.job("inner");
    assert_eq!(job["error"], Value::Null, "{job}");
    for vdi in [&scene.d, &scene.s2] {
        let receipt = of(&job, vdi);
        assert_eq!((receipt["verdict"].as_str(), receipt["matched"].as_u64()), (Some("same"), Some(16)));
        assert_eq!(receipt["sha256"][0], receipt["sha256"][1]);
    }
    assert_eq!(job["receipt"]["state"], "compared", "{job}");
    let opened = opened(&scene.host);
    assert_eq!((opened.len(), &opened[0]["job"]), (1, &job["job"]));
    for disk in opened[0]["receipt"]["disks"].as_array().unwrap() {
        assert_eq!(disk["sha256"], of(&job, disk["vdi"].as_str().unwrap())["sha256"][0], "{opened:?}");
    }
    let metrics = scene.host.metrics(Daemon::Gcd);
    assert!(metrics.contains("coppice_gc_receipt_blocks_matched_total") && metrics.contains("} 32\n"));
}

#[test]
fn a_disk_that_was_attached_and_written_in_between_has_a_void_receipt() {
    let scene = Scene::new(false);
    scene.begin();
    scene.until_copying();
    let at = scene.host.attach(&scene.d);
    write(&at, 0..2, 0x44);
    scene.host.ok(&["vdi", "detach", "d"]);
    let job = scene.job("inner");
    assert_eq!(job["error"], Value::Null, "{job}");
    let receipt = of(&job, &scene.d);
    assert_eq!(receipt["verdict"], "void", "{job}");
    assert!(receipt["reason"].as_str().unwrap().contains("attached for writing"), "{job}");
    assert_eq!(of(&job, &scene.s2)["verdict"], "same", "{job}");
    assert_eq!(scene.host.ok(&["gc", "status", "store"])["srs"][0]["alarms"], Value::Null);
}

#[test]
fn a_reading_gives_way_to_who_wants_the_disk() {
    let scene = Scene::new(false);
    scene.begin();
    scene.until_reading();
    // Refused to who comes during an export; not here, whichever is read.
    let at = scene.host.attach(&scene.d);
    write(&at, 12..13, 0x44);
    let job = scene.job("inner");
    assert_eq!(job["error"], Value::Null, "{job}");
    assert_eq!(of(&job, &scene.s2)["verdict"], "same", "{job}");
    // Read before it was attached: void. Attached first: a guest like any other.
    let receipt = of(&job, &scene.d);
    let fine = receipt["verdict"] == "void" || (receipt["attached"] == true && receipt["verdict"] == "same");
    assert!(fine, "{job}");
}

#[test]
fn a_tapdisk_that_died_in_between_makes_its_receipt_void() {
    let scene = Scene::new(true);
    scene.begin();
    scene.until_copying();
    scene.at.as_ref().unwrap().kill();
    let job = scene.job("inner");
    let receipt = of(&job, &scene.d);
    assert_eq!(
        (receipt["verdict"].as_str(), receipt["attached"].as_bool()),
        (Some("void"), Some(true)),
        "{job}"
    );
    assert_eq!(scene.host.ok(&["gc", "status", "store"])["srs"][0]["alarms"], Value::Null);
}

#[test]
fn a_collector_that_died_in_between_raises_no_alarm() {
    let mut scene = Scene::new(false);
    scene.begin();
    scene.until_copying();
    // Written once the merge is under way, before its first step.
    wait_until("the receipt to be open", || !opened(&scene.host).is_empty());
    scene.host.kill(Daemon::Gcd);
    // Nobody remembers what was read; the history says that somebody did.
    let left_open = opened(&scene.host);
    assert_eq!((left_open.len(), &left_open[0]["receipt"]["state"]), (1, &"open".into()), "{left_open:?}");
    let disks = left_open[0]["receipt"]["disks"].as_array().unwrap();
    assert!(disks.len() == 2 && disks.iter().all(|disk| disk["sha256"].is_string()), "{left_open:?}");
    // What a person may do meanwhile, unseen by anybody.
    let at = scene.host.attach(&scene.d);
    write(&at, 0..2, 0x44);
    scene.host.ok(&["vdi", "detach", "d"]);
    scene.host.start(Daemon::Gcd);
    let job = scene.job("inner");
    assert_eq!(job["error"], Value::Null, "{job}");
    let void = job["receipt"]["void"].as_str();
    // Its record was carried on, or recovery had dropped it and it began anew.
    let carried_on = void.is_some_and(|why| why.contains("carried on"));
    assert!(carried_on || of(&job, &scene.d)["verdict"] == "same", "{job}");
    let state = if carried_on { "void" } else { "compared" };
    assert_eq!(job["receipt"]["state"], state, "{job}");
    // Of the merge that nobody compared, no line says that somebody did.
    assert!(carried_on == (left_open[0]["job"] == job["job"]), "{left_open:?} {job}");
    assert_eq!(scene.host.ok(&["gc", "status", "store"])["srs"][0]["alarms"], Value::Null);
}

#[test]
fn an_aborted_merge_says_nothing_and_the_next_one_does() {
    let scene = Scene::new(false);
    scene.begin();
    scene.until_reading();
    assert_eq!(scene.host.ok(&["gc", "abort", "store"])["aborted"], 1);
    let job = scene.job("inner");
    assert_eq!((job["error"].as_str(), &job["receipt"]), (Some("aborted"), &Value::Null), "{job}");
    scene.host.ok(&["gc", "set", "store", "--rate", "0"]);
    let ran = scene.host.ok(&["gc", "run", "store", "--wait"]);
    assert_eq!((&ran["coalesced"], &ran["failed"]), (&1.into(), &serde_json::json!([])), "{ran}");
    let status = scene.host.ok(&["gc", "status", "store"]);
    let last = status["done"].as_array().unwrap().last().unwrap();
    assert_eq!(of(last, &scene.s2)["verdict"], "same", "{status}");
}

/// Changes a byte of an image behind everybody's back.
fn damage(folder: &Path, place: &Value) {
    let path = folder.join(place["volume"].as_str().unwrap());
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let at = place["file_offset"].as_u64().unwrap() + 12_345;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    assert_eq!(byte, [0x11]);
    file.write_all_at(&[0x13], at).unwrap();
}

#[test]
fn a_byte_that_changes_behind_a_merge_is_an_alarm_that_only_a_person_ends() {
    let mut scene = Scene::new(false);
    // Block 2 lies in base1 alone and is not moved.
    let map = scene.host.ok(&["vdi", "map", "s2", "4MiB", "2MiB"]);
    let place = map[0].clone();
    scene.begin();
    scene.until_copying();
    damage(&scene.folder, &place);
    let job = scene.job("inner");
    let error = job["error"].as_str().unwrap_or_else(|| panic!("{job}"));
    for vdi in [&scene.d, &scene.s2] {
        let receipt = of(&job, vdi);
        assert_eq!(receipt["verdict"], "different", "{job}");
        assert_eq!(receipt["different_blocks"], serde_json::json!([2]), "{job}");
        assert_eq!(receipt["matched"], 15);
        assert!(error.contains(vdi.as_str()), "{error}");
    }
    let log = scene.host.log(Daemon::Gcd);
    assert!(log.lines().any(|line| line.contains("ERROR") && line.contains("content receipt")), "{log}");
    assert!(
        scene
            .host
            .metrics(Daemon::Gcd)
            .lines()
            .any(|line| { line.starts_with("coppice_gc_receipt_alarms") && line.ends_with(" 1") })
    );

    // Now there is a leaf to merge: it waits, whoever asks, also after a restart.
    scene.host.ok(&["gc", "set", "store", "--rate", "0"]);
    scene.host.ok(&["vdi", "delete", "s2"]);
    let waits = |host: &Host| {
        let ran = host.ok(&["gc", "run", "store", "--wait"]);
        let failed = ran["failed"].as_array().unwrap();
        assert!(failed.iter().any(|one| one["reason"].as_str().unwrap().contains("gc acknowledge")), "{ran}");
        assert_eq!((&ran["leaf_coalesced"], &ran["deleted"]), (&0.into(), &0.into()), "{ran}");
        let status = host.ok(&["gc", "status", "store"]);
        assert_eq!(status["srs"][0]["alarms"][0]["job"], job["job"], "{status}");
    };
    waits(&scene.host);
    scene.host.kill(Daemon::Gcd);
    scene.host.start(Daemon::Gcd);
    waits(&scene.host);

    scene.host.refused(&["gc", "acknowledge", "store", "another"], "NOT_FOUND");
    let said = scene.host.ok(&["gc", "acknowledge", "store", job["job"].as_str().unwrap()]);
    assert_eq!(said["acknowledged"][0], job["job"]);
    let ran = scene.host.ok(&["gc", "run", "store", "--wait"]);
    assert_eq!(ran["failed"], serde_json::json!([]), "{ran}");
    let tree = scene.host.ok(&["sr", "tree", "store"]);
    assert_eq!(tree["roots"][0]["depth"], 1, "{tree}");
}
