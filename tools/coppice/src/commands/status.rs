//! `coppice status`: one look at everything.

use serde_json::{Value, json};

use super::Context;
use crate::client::Daemon;
use crate::failure::{Failure, Outcome};
use crate::render;
use crate::view::{self, GcStatus, Sr};

/// Asks both daemons. One that does not run is part of the answer; only when
/// neither runs has the command failed.
pub fn run(context: &Context) -> Outcome<()> {
    let smd = state(&context.smd, "/srs")?;
    let smd_status = state(&context.smd, "/status")?;
    let gcd = state(&context.gcd, "/status")?;
    if smd.is_none() && gcd.is_none() {
        return Err(context
            .smd
            .get("/srs")
            .err()
            .unwrap_or_else(|| Failure::new("BUSY", "the daemons are just starting: ask again")));
    }
    let answer = json!({
        "smd": {"running": smd.is_some(), "status": smd_status},
        "gcd": {"running": gcd.is_some(), "status": gcd},
        "srs": smd.clone().map_or(Value::Null, |srs| view::inner(srs, "srs")),
    });
    let srs: Vec<Sr> = smd.as_ref().map_or(Ok(Vec::new()), |srs| view::list_of(srs, "srs"))?;
    let gc_view: Option<GcStatus> = gcd.as_ref().map(view::read).transpose()?;
    context.output.result(&answer, || {
        let runs = |up: bool| if up { "runs" } else { "does not run" };
        let mut text = format!("smd {}\ngcd {}\n\n", runs(smd.is_some()), runs(gcd.is_some()));
        text.push_str(&render::srs(&srs));
        text.push_str(&render::down(smd_status.as_ref()));
        text.push_str(&render::troubled(smd_status.as_ref()));
        text.push_str(&render::health(smd_status.as_ref()));
        if let Some(gcd) = &gc_view {
            text.push_str(&format!("\n{}", render::gc_status(gcd)));
        }
        text
    });
    Ok(())
}

/// The daemon's answer, or nothing when it does not run.
fn state(daemon: &Daemon, path: &str) -> Outcome<Option<Value>> {
    match daemon.get(path) {
        Ok(answer) => Ok(Some(answer)),
        Err(failure) if failure.code == "NOT_RUNNING" => Ok(None),
        Err(failure) => Err(failure),
    }
}
