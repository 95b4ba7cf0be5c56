//! Broken images: each is refused with its name and the reason, nothing is
//! changed, and everything else in the same SR goes on (invariant 11).

use std::collections::BTreeMap;
use std::path::Path;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use uuid::Uuid;

use crate::support::forge::Forged;
use crate::support::host::Host;
use crate::support::programs::{have, run};

/// A good image with some data, a differencing one, and where both came from.
struct Templates {
    plain: Forged,
    child: Forged,
    /// What the child's locators say, `./` included.
    parent_text: String,
}

/// Has our own programs make one of each.
fn templates(host: &Host) -> Templates {
    let folder = host.sr("templates");
    let vdi = host.disk("templates", "t", "16MiB");
    let at = host.attach(&vdi);
    let mut command = std::process::Command::new("qemu-io");
    run(command.args(["-f", "raw", "-t", "none", "-c", "write -P 7 0 3M"]).arg(&at.uri));
    host.ok(&["vdi", "detach", "t"]);
    let plain = Forged::from(&folder.join(format!("{vdi}.vhd")));
    host.ok(&["vdi", "snapshot", "t", "--name", "s"]);
    let snapshot = host.ok(&["vdi", "show", "s"]);
    let parent = snapshot["parent"].as_str().unwrap();
    let child = Forged::from(&folder.join(format!("{}.vhd", snapshot["uuid"].as_str().unwrap())));
    host.ok(&["sr", "detach", "templates"]);
    Templates { plain, child, parent_text: format!("./{parent}.vhd") }
}

/// One bad image, and what must be said of it.
struct Case {
    what: &'static str,
    image: Forged,
    /// Any of these codes.
    codes: &'static [&'static str],
}

fn cases(from: &Templates) -> Vec<Case> {
    let mut rng = SmallRng::seed_from_u64(1);
    // Each with a uuid of its own: one that two images share is refused for
    // that alone.
    let plain = || from.plain.clone().with_footer_uuid(Uuid::new_v4());
    let child = || from.child.clone().with_footer_uuid(Uuid::new_v4());
    let case = |what, image| Case { what, image, codes: &["BAD_IMAGE"] };
    let outside = format!("../{}.vhd", "a".repeat(from.parent_text.len() - 7));
    let absolute = format!("/{}.vhd", "a".repeat(from.parent_text.len() - 5));
    let mut cases = vec![
        case("an empty file", plain().truncated(0)),
        case("less than a footer", plain().truncated(511)),
        case("cut in its headers", plain().truncated(1600)),
        case("cut in its data, footers gone", {
            let half = plain().len() / 2;
            plain().truncated(half).smeared(0..512, 0)
        }),
        case("random bytes", Forged::random(&mut rng, 1 << 20)),
        case("footers that disagree", plain().with_contradicting_footers()),
        case("a header of zeros", plain().smeared(512..1536, 0)),
        case("a size beyond all sense", plain().with_size(!511)),
        case("more table than file", plain().with_entries(u32::MAX)),
        case("too few table entries for its size", plain().with_entries(1)),
        case("a table beyond the end", plain().with_table_at(1 << 60)),
        case("a table over the footer", plain().with_table_at(0)),
        case("a block size of nothing", plain().with_block_size(0)),
        case("a block size that is no power of two", plain().with_block_size(3 << 20)),
        case("blocks over the headers", plain().with_every_block_at(1)),
        case("blocks beyond the end", plain().with_every_block_at(0x7fff_ff00)),
    ];
    let to = |parent: &str| child().with_parent(Uuid::new_v4(), &from.parent_text, parent);
    cases.push(Case { what: "a parent above the SR", image: to(&outside), codes: &["PARENT_OUTSIDE_SR"] });
    cases.push(Case { what: "a parent anywhere", image: to(&absolute), codes: &["PARENT_OUTSIDE_SR"] });
    cases.push(Case { what: "a parent that is not there", image: child(), codes: &["MISSING_PARENT"] });
    cases
}

#[test]
fn each_broken_image_is_refused_by_name_and_left_alone() {
    if !have("qemu-io") {
        return;
    }
    let host = Host::new();
    let templates = templates(&host);
    let cases = cases(&templates);
    let folder = host.data().join("bad");
    std::fs::create_dir(&folder).unwrap();
    let good = Uuid::new_v4();
    templates.plain.put(&folder, good);
    let placed: Vec<(Uuid, String)> = cases
        .iter()
        .map(|case| {
            let uuid = Uuid::new_v4();
            (uuid, case.image.clone().put(&folder, uuid))
        })
        .collect();
    let before = contents(&folder);
    let path = folder.to_str().unwrap();
    host.ok(&["sr", "introduce", "bad", "--type", "file", "--path", path]);
    let mut failures = Vec::new();
    for (case, (uuid, name)) in cases.iter().zip(&placed) {
        let said = host.cli(&["vdi", "attach", &uuid.to_string()]);
        let named = said.stderr.contains(name) || said.stderr.contains(&uuid.to_string());
        if said.status != 1 || !case.codes.contains(&said.code()) || !named {
            failures.push(format!("{}: {said:?}", case.what));
        } else {
            eprintln!("{}: {}", case.what, said.json["error"]["message"]);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(contents(&folder), before, "a broken image was changed");
    host.attach(&good.to_string());
}

#[test]
fn a_cycle_of_parents_ends() {
    if !have("qemu-io") {
        return;
    }
    let host = Host::new();
    let Templates { child, parent_text, .. } = templates(&host);
    let folder = host.data().join("cycle");
    std::fs::create_dir(&folder).unwrap();
    let (one, two) = (Uuid::new_v4(), Uuid::new_v4());
    let (of_one, of_two) = (Uuid::new_v4(), Uuid::new_v4());
    let link = |own: Uuid, parent: Uuid, name: Uuid| {
        let image = child.clone().with_footer_uuid(own);
        image.with_parent(parent, &parent_text, &format!("./{name}.vhd"))
    };
    link(of_one, of_two, two).put(&folder, one);
    link(of_two, of_one, one).put(&folder, two);
    let before = contents(&folder);
    let path = folder.to_str().unwrap();
    host.ok(&["sr", "introduce", "cycle", "--type", "file", "--path", path]);
    let said = host.refused(&["vdi", "attach", &one.to_string()], "BAD_IMAGE");
    assert!(said.stderr.contains("leads back to itself"), "{}", said.stderr);
    host.ok(&["sr", "tree", "cycle"]);
    host.ok(&["gc", "run", "cycle", "--wait"]);
    assert_eq!(contents(&folder), before);
}

#[test]
fn absurd_requests_are_refused() {
    let host = Host::new();
    host.sr("store");
    for size in ["0", "9000000TiB"] {
        host.refused(&["vdi", "create", "store", "d", "--size", size], "BAD_SIZE");
    }
    assert_eq!(host.cli(&["vdi", "create", "store", "d", "--size", "lots"]).status, 2);
    assert_eq!(host.ok(&["vdi", "list"]).as_array().map(Vec::len), Some(0));
    host.refused(&["vdi", "create", "elsewhere", "d", "--size", "1MiB"], "NOT_FOUND");
}

/// Every image in a folder, whole.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    files
        .filter(|file| file.file_name().to_string_lossy().ends_with(".vhd"))
        .map(|file| {
            let name = file.file_name().into_string().unwrap();
            (name, std::fs::read(file.path()).unwrap())
        })
        .collect()
}
