//! `coppice vdi snapshot`, with and without hooks.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Context;
use crate::failure::{Failure, Outcome};
use crate::hooks;
use crate::jobs::{self, Interrupts};
use crate::resolve;
use crate::view;

/// How often a snapshot under way is looked at, in milliseconds: guests are
/// thawed that much later than they could be.
const LOOK_MS: u64 = 20;

/// What is to be taken.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// The disks.
    pub vdis: &'a [String],
    /// Name of the snapshots.
    pub name: Option<&'a str>,
    /// Run before the instant.
    pub before: Option<&'a str>,
    /// Run after it, whatever came of it.
    pub after: Option<&'a str>,
    /// How long each hook, and the snapshot between them, may take.
    pub limit: Duration,
}

/// Takes a snapshot; returns smd's document.
///
/// # Errors
/// As smd says; `HOOK_FAILED`. After a failed first hook nothing was taken;
/// after a failed second one the snapshots are there, and named in the error.
pub fn take(context: &Context, wanted: &Wanted<'_>) -> Outcome<Value> {
    let smd = &context.smd;
    let resolve = |vdi: &String| resolve::vdi(smd, vdi);
    let vdis: Vec<String> = wanted.vdis.iter().map(resolve).collect::<Outcome<_>>()?;
    if wanted.before.is_none() && wanted.after.is_none() {
        return smd.post("/vdis/snapshot", &json!({"vdis": vdis, "name": wanted.name}));
    }
    let interrupts = Interrupts::hold_off()?;
    let body = json!({"vdis": vdis, "name": wanted.name, "hold": true});
    let job = Job { context, id: uuid_of(&smd.post("/vdis/snapshot", &body)?)?, interrupts };
    job.until("ready", None)?;
    let taken = job.bracketed(wanted, &vdis);
    // Whatever came of it: a frozen guest must not stay so.
    let after = match wanted.after {
        Some(after) => hooks::run("after", after, &vdis, wanted.limit, || false),
        None => Ok(()),
    };
    taken?;
    let answer = jobs::follow(context, &job.show()?)?;
    after.map_err(|mut failure| {
        failure.message.push_str("; the snapshot was taken all the same");
        failure.more.insert("vdis".to_owned(), view::inner(answer.clone(), "vdis"));
        failure
    })?;
    Ok(answer)
}

struct Job<'a> {
    context: &'a Context,
    id: String,
    interrupts: Interrupts,
}

impl Job<'_> {
    /// From the first hook to the end of the instant.
    fn bracketed(&self, wanted: &Wanted<'_>, vdis: &[String]) -> Outcome<()> {
        let smd = &self.context.smd;
        let frozen = match wanted.before {
            Some(before) => hooks::run("before", before, vdis, wanted.limit, || self.interrupts.pressed()),
            None => Ok(()),
        };
        let taken = frozen.and_then(|()| {
            smd.post(&format!("/jobs/{}/proceed", self.id), &Value::Null)?;
            self.until("taken", Some(wanted.limit))
        });
        if taken.is_err() {
            // It may have ended; if not it must not happen later.
            let _ = smd.post(&format!("/jobs/{}/cancel", self.id), &Value::Null);
        }
        taken
    }

    /// Waits until the job has passed a point or ended well.
    fn until(&self, stage: &str, limit: Option<Duration>) -> Outcome<()> {
        let begun = Instant::now();
        loop {
            let shown = self.show()?;
            let state = shown.get("state").and_then(Value::as_str).unwrap_or_default().to_owned();
            match state.as_str() {
                "queued" => {}
                "running" if shown.get("stage").and_then(Value::as_str) == Some(stage) => return Ok(()),
                "running" => {}
                "done" => return Ok(()),
                _ => return jobs::follow(self.context, &shown).map(drop),
            }
            let stopped = self.interrupts.pressed();
            let late = limit.is_some_and(|limit| begun.elapsed() >= limit);
            if stopped || late {
                let _ = self.context.smd.post(&format!("/jobs/{}/cancel", self.id), &Value::Null);
                let why = if stopped { "it was stopped" } else { "it took too long" };
                return Err(Failure::new("CANCELLED", format!("no snapshot was taken: {why}")));
            }
        }
    }

    fn show(&self) -> Outcome<Value> {
        std::thread::sleep(Duration::from_millis(LOOK_MS));
        self.context.smd.get(&format!("/jobs/{}", self.id))
    }
}

fn uuid_of(job: &Value) -> Outcome<String> {
    let id = job.get("id").and_then(Value::as_str);
    id.map(str::to_owned).ok_or_else(|| Failure::new("IO_ERROR", "smd answered without a job"))
}
