//! Where the bytes of a disk lie: `coppice vdi map`, `changed` and `stat`.
//!
//! One answer covers as much as its limits let it; the rest is asked for.

use serde_json::{Value, json};

use super::Context;
use crate::failure::{Failure, Outcome};
use crate::render::places;
use crate::resolve;
use crate::view::{self, ChangedRange, MapExtent, Stat};

/// `vdi changed VDI --since VDI`.
pub fn changed(context: &Context, vdi: &str, since: &str) -> Outcome<()> {
    let smd = &context.smd;
    let (vdi, since) = (resolve::vdi(smd, vdi)?, resolve::vdi(smd, since)?);
    let mut ranges: Vec<ChangedRange> = Vec::new();
    let mut from = Some(0);
    while let Some(at) = from {
        let answer = smd.get(&format!("/vdis/{vdi}/changed?since={since}&offset={at}"))?;
        for range in view::list_of::<ChangedRange>(&answer, "ranges")? {
            match ranges.last_mut() {
                Some(last) if last.offset + last.length == range.offset => last.length += range.length,
                _ => ranges.push(range),
            }
        }
        from = next(&answer, at)?;
    }
    let list = ranges.iter().map(|range| json!({"offset": range.offset, "length": range.length}));
    context.output.result(&Value::Array(list.collect()), || places::changed(&ranges));
    Ok(())
}

/// `vdi map VDI [OFFSET [LENGTH]]`.
pub fn map(context: &Context, vdi: &str, offset: u64, length: Option<u64>) -> Outcome<()> {
    let smd = &context.smd;
    let vdi = resolve::vdi(smd, vdi)?;
    let mut extents: Vec<Value> = Vec::new();
    let mut from = Some(offset);
    while let Some(at) = from {
        let left = length.map(|length| length.saturating_sub(at - offset));
        let left = left.map(|left| format!("&length={left}")).unwrap_or_default();
        let mut answer = smd.get(&format!("/vdis/{vdi}/map?offset={at}{left}"))?;
        from = next(&answer, at)?;
        if let Some(Value::Array(part)) = answer.get_mut("extents") {
            extents.append(part);
        }
    }
    let document = Value::Array(extents);
    let list: Vec<MapExtent> = view::read(&document)?;
    context.output.result(&document, || places::map(&list));
    Ok(())
}

/// `vdi stat VDI`.
pub fn stat(context: &Context, vdi: &str) -> Outcome<()> {
    let vdi = resolve::vdi(&context.smd, vdi)?;
    let document = context.smd.get(&format!("/vdis/{vdi}/stat"))?;
    let stat: Stat = view::read(&document)?;
    context.output.result(&document, || places::stat(&stat));
    Ok(())
}

/// Where to ask on. It must go forward, or this would not end.
fn next(answer: &Value, at: u64) -> Outcome<Option<u64>> {
    match answer.get("next").and_then(Value::as_u64) {
        Some(next) if next <= at => {
            Err(Failure::new("IO_ERROR", format!("smd answered for byte {at} and then again")))
        }
        next => Ok(next),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_does_not_go_on_ends_the_asking() {
        assert_eq!(next(&json!({"next": 8}), 4).unwrap(), Some(8));
        assert_eq!(next(&json!({"next": null}), 4).unwrap(), None);
        assert_eq!(next(&json!({"next": 4}), 4).unwrap_err().code, "IO_ERROR");
    }
}
