//! Names to uuids.

use serde_json::Value;

use crate::client::{Daemon, escaped};
use crate::failure::{Failure, Outcome};
use crate::view::{Sr, Vdi, list_of};

/// The uuid of the storage repository called `text`.
pub fn sr(smd: &Daemon, text: &str) -> Outcome<String> {
    if is_uuid(text) {
        return Ok(text.to_owned());
    }
    let all: Vec<Sr> = list_of(&smd.get(&format!("/srs?name={}", escaped(text)))?, "srs")?;
    unique("storage repository", text, all.iter().map(|sr| (sr.name.as_str(), sr.uuid.as_str())))
}

/// The uuid of the disk called `text`.
pub fn vdi(smd: &Daemon, text: &str) -> Outcome<String> {
    if is_uuid(text) {
        return Ok(text.to_owned());
    }
    let all: Vec<Vdi> = list_of(&smd.get(&format!("/vdis?name={}", escaped(text)))?, "vdis")?;
    let visible = all.iter().filter(|vdi| vdi.kind != "hidden");
    unique("disk", text, visible.map(|vdi| (vdi.name.as_str(), vdi.uuid.as_str())))
}

/// The uuid of a storage repository or else of a disk, and which of the two,
/// as the collector calls them. It tells uuids apart itself, so that it can
/// be asked with smd dead too.
pub fn sr_or_vdi(smd: &Daemon, text: &str) -> Outcome<(&'static str, String)> {
    if is_uuid(text) {
        return Ok(("sr", text.to_owned()));
    }
    let srs: Vec<Sr> = list_of(&smd.get(&format!("/srs?name={}", escaped(text)))?, "srs")?;
    if srs.iter().any(|sr| sr.name == text) {
        return Ok(("sr", sr(smd, text)?));
    }
    Ok(("vdi", vdi(smd, text)?))
}

fn is_uuid(text: &str) -> bool {
    uuid::Uuid::try_parse(text).is_ok()
}

fn unique<'a>(what: &str, wanted: &str, known: impl Iterator<Item = (&'a str, &'a str)>) -> Outcome<String> {
    let mut found: Vec<&str> = known.filter(|(name, _)| *name == wanted).map(|(_, uuid)| uuid).collect();
    match (found.pop(), found.len()) {
        (None, _) => Err(Failure::new("NOT_FOUND", format!("no {what} is called \"{wanted}\""))),
        (Some(uuid), 0) => Ok(uuid.to_owned()),
        (Some(last), others) => {
            found.push(last);
            let message = format!("{} are called \"{wanted}\": {}", others + 1, found.join(", "));
            let mut failure = Failure::new("AMBIGUOUS", message);
            let candidates = found.into_iter().map(Value::from).collect();
            failure.more.insert("candidates".to_owned(), Value::Array(candidates));
            Err(failure)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [(&str, &str); 3] = [("a", "1"), ("b", "2"), ("b", "3")];

    #[test]
    fn a_name_must_be_unique() {
        assert_eq!(unique("disk", "a", KNOWN.into_iter()), Ok("1".to_owned()));
        let none = unique("disk", "c", KNOWN.into_iter()).unwrap_err();
        assert_eq!(none.code, "NOT_FOUND");
        let two = unique("disk", "b", KNOWN.into_iter()).unwrap_err();
        assert_eq!(two.code, "AMBIGUOUS");
        assert!(two.message.starts_with("2 are called"), "{two}");
    }
}
