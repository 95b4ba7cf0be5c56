//! Following a job of smd to its end, and stopping it with Ctrl-C.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;

use serde::Deserialize;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::commands::Context;
use crate::failure::{Failure, Outcome};
use crate::output::say;
use crate::progress::{Figures, Progress};
use crate::view;

/// How long one look waits for the end, in milliseconds: as often the bar is
/// drawn.
const LOOK_MS: u64 = 200;

/// A job, as far as it is followed.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Job {
    id: String,
    operation: String,
    state: String,
    bytes_done: u64,
    bytes_total: Option<u64>,
    rate: f64,
    eta_s: Option<f64>,
    result: Value,
    error: Value,
}

/// How often Ctrl-C was pressed, from the first question on.
#[derive(Debug, Clone)]
pub struct Interrupts {
    count: Arc<AtomicU32>,
}

impl Interrupts {
    /// From now on Ctrl-C is counted and no longer ends this program by
    /// itself; the second one does.
    ///
    /// # Errors
    /// No thread or no signal handler can be had.
    pub fn listen() -> Outcome<Self> {
        Self::of(&[SignalKind::interrupt()], 2)
    }

    /// As [`Self::listen`], for every way in which this program is asked to
    /// end, however often: what was begun must be put right first.
    ///
    /// # Errors
    /// As [`Self::listen`].
    pub fn hold_off() -> Outcome<Self> {
        Self::of(&[SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()], u32::MAX)
    }

    fn of(kinds: &[SignalKind], last: u32) -> Outcome<Self> {
        let count = Arc::new(AtomicU32::new(0));
        let counted = count.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        let mut signals = kinds.iter().map(|kind| signal(*kind)).collect::<Result<Vec<_>, _>>()?;
        drop(entered);
        let listen = move || {
            runtime.block_on(std::future::poll_fn(|context| {
                for signal in &mut signals {
                    while let Poll::Ready(Some(())) = signal.poll_recv(context) {
                        if counted.fetch_add(1, Ordering::Relaxed) + 1 >= last {
                            std::process::exit(1);
                        }
                    }
                }
                Poll::<()>::Pending
            }));
        };
        std::thread::Builder::new().name("ctrl-c".into()).spawn(listen)?;
        Ok(Self { count })
    }

    /// Whether it was pressed.
    pub fn pressed(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }
}

/// Follows the job that smd answered with, and returns its result. Ctrl-C
/// cancels it; once more leaves it alone.
///
/// # Errors
/// What the job failed with, `CANCELLED`, and a daemon that cannot be reached.
pub fn follow(context: &Context, answer: &Value) -> Outcome<Value> {
    let job: Job = view::read(answer)?;
    follow_until(context, job, &Interrupts::listen()?)
}

fn follow_until(context: &Context, mut job: Job, interrupts: &Interrupts) -> Outcome<Value> {
    let mut bar = Progress::new(context.output, &job.operation);
    let mut asked = false;
    loop {
        match job.state.as_str() {
            "queued" | "running" => {}
            _ => return result(job),
        }
        if interrupts.pressed() && !asked {
            asked = true;
            drop(bar);
            say("stopping; press Ctrl-C again to leave");
            context.smd.post(&format!("/jobs/{}/cancel", job.id), &Value::Null)?;
            bar = Progress::new(context.output, &job.operation);
        }
        if job.state == "running" {
            let figures =
                Figures { done: job.bytes_done, total: job.bytes_total, rate: job.rate, eta_s: job.eta_s };
            bar.show(&figures);
        }
        job = view::read(&context.smd.get(&format!("/jobs/{}?wait_ms={LOOK_MS}", job.id))?)?;
    }
}

/// What an ended job came to.
fn result(job: Job) -> Outcome<Value> {
    match job.state.as_str() {
        "done" => Ok(job.result),
        "cancelled" => Err(Failure::new("CANCELLED", format!("{} was cancelled", job.operation))),
        "failed" => {
            Err(Failure::from_answer(0, serde_json::json!({"error": job.error}).to_string().as_bytes()))
        }
        other => Err(Failure::new("IO_ERROR", format!("a job in a state that is not known: {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ended(job: Value) -> Outcome<Value> {
        result(view::read(&job).unwrap())
    }

    #[test]
    fn a_job_ends_as_the_command_does() {
        let done = json!({"id": "1", "operation": "copy", "state": "done", "result": {"uuid": "u"}});
        assert_eq!(ended(done).unwrap()["uuid"], "u");
        let error = json!({"code": "NO_SPACE", "message": "no room"});
        let failed = ended(json!({"operation": "copy", "state": "failed", "error": error})).unwrap_err();
        assert_eq!((failed.code.as_str(), failed.message.as_str()), ("NO_SPACE", "no room"));
        assert_eq!(ended(json!({"state": "cancelled"})).unwrap_err().code, "CANCELLED");
    }
}
