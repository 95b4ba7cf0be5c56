//! `coppice gc …`.

use serde_json::{Value, json};

use super::Context;
use crate::cli::{GcCommand, GcScope, Switch};
use crate::client::escaped;
use crate::failure::Outcome;
use crate::render;
use crate::resolve;
use crate::view;

/// Does what was asked.
pub fn run(context: &Context, command: GcCommand) -> Outcome<()> {
    let gcd = &context.gcd;
    match command {
        GcCommand::Run { what, dry_run, wait } => {
            let mut body = json!({"dry_run": dry_run, "wait": wait});
            if let Some(what) = what {
                let (key, uuid) = resolve::sr_or_vdi(&context.smd, &what)?;
                if key == "sr" && dry_run {
                    body["offline"] = offline(context, &uuid)?;
                }
                body[key] = uuid.into();
            }
            let answer = gcd.post_slow("/run", &body)?;
            context.output.result(&answer, || render::report::collected(&answer));
        }
        GcCommand::Status(scope) => status(context, &scope)?,
        GcCommand::Pause { what } => switch(context, what, "/pause")?,
        GcCommand::Resume { what } => switch(context, what, "/resume")?,
        GcCommand::Abort(scope) => tell(context, &scope, "/abort")?,
        GcCommand::Set { sr, rate, parallel, latency_factor, receipts } => {
            let sr = resolve::sr(&context.smd, &sr)?;
            let body = json!({
                "sr": sr,
                "rate": rate.map(|rate| rate.0),
                "parallel": parallel,
                "latency_factor": latency_factor,
                "receipts": receipts.map(|switch| switch == Switch::On),
            });
            show(context, &gcd.post("/set", &body)?);
        }
        GcCommand::Receipt { sr, job } => {
            let sr = resolve::sr(&context.smd, &sr)?;
            let answer = gcd.get(&format!("/receipt?sr={}&job={}", escaped(&sr), escaped(&job)))?;
            context.output.result(&answer, || render::receipts::hashes(&answer));
        }
        GcCommand::Acknowledge { sr, job } => {
            let sr = resolve::sr(&context.smd, &sr)?;
            show(context, &gcd.post("/acknowledge", &json!({"sr": sr, "job": job}))?);
        }
    }
    Ok(())
}

/// Where an SR lies that is not attached, so that gcd can look at it.
fn offline(context: &Context, sr: &str) -> Outcome<Value> {
    let sr = context.smd.get(&format!("/srs/{}", escaped(sr)))?;
    Ok(match sr["attached"].as_bool() {
        Some(false) => json!({"path": sr["location"], "name": sr["name"]}),
        _ => Value::Null,
    })
}

fn status(context: &Context, scope: &GcScope) -> Outcome<()> {
    let answer = match uuid_of(context, scope)? {
        Some(sr) => context.gcd.get(&format!("/status?sr={}", escaped(&sr)))?,
        None => context.gcd.get("/status")?,
    };
    let status: view::GcStatus = view::read(&answer)?;
    context.output.result(&answer, || render::gc_status(&status));
    Ok(())
}

fn tell(context: &Context, scope: &GcScope, path: &str) -> Outcome<()> {
    let sr = uuid_of(context, scope)?;
    show(context, &context.gcd.post(path, &json!({"sr": sr}))?);
    Ok(())
}

fn switch(context: &Context, what: Option<String>, path: &str) -> Outcome<()> {
    let mut body = json!({});
    if let Some(what) = what {
        let (key, uuid) = resolve::sr_or_vdi(&context.smd, &what)?;
        body[key] = uuid.into();
    }
    show(context, &context.gcd.post(path, &body)?);
    Ok(())
}

fn uuid_of(context: &Context, scope: &GcScope) -> Outcome<Option<String>> {
    scope.sr.as_deref().map(|sr| resolve::sr(&context.smd, sr)).transpose()
}

fn show(context: &Context, answer: &Value) {
    context.output.result(answer, || render::object(answer));
}
