//! `coppice gc …`.

use serde_json::{Value, json};

use super::Context;
use crate::cli::GcCommand;
use crate::client::escaped;
use crate::failure::Outcome;
use crate::render;
use crate::resolve;

/// Does what was asked.
pub fn run(context: &Context, command: GcCommand) -> Outcome<()> {
    let gcd = &context.gcd;
    let answer = match command {
        GcCommand::Run { sr, dry_run, wait } => {
            let sr = uuid_of(context, sr.as_deref())?;
            let body = json!({"sr": sr, "dry_run": dry_run, "wait": wait});
            gcd.post_slow("/run", &body)?
        }
        GcCommand::Status { sr } => match uuid_of(context, sr.as_deref())? {
            Some(sr) => gcd.get(&format!("/status?sr={}", escaped(&sr)))?,
            None => gcd.get("/status")?,
        },
        GcCommand::Pause { sr } => tell(context, sr.as_deref(), "/pause")?,
        GcCommand::Resume { sr } => tell(context, sr.as_deref(), "/resume")?,
        GcCommand::Abort { sr } => tell(context, sr.as_deref(), "/abort")?,
    };
    context.output.result(&answer, || render::object(&answer));
    Ok(())
}

fn tell(context: &Context, sr: Option<&str>, path: &str) -> Outcome<Value> {
    let sr = uuid_of(context, sr)?;
    context.gcd.post(path, &json!({"sr": sr}))
}

fn uuid_of(context: &Context, sr: Option<&str>) -> Outcome<Option<String>> {
    sr.map(|sr| resolve::sr(&context.smd, sr)).transpose()
}
