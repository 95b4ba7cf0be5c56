//! HTTP and JSON on `smd.sock`.
//!
//! ```text
//!   routes.rs     which request calls what; `GET /openapi.json` lists them
//!   srs.rs        repositories
//!   vdis.rs       VDIs: made, named, served
//!   snapshots.rs  snapshots and clones
//!   disks.rs      resize, revert, copy, map, changed
//!   jobs.rs       long operations: begun, looked at, stopped
//!   answer.rs     results and errors as JSON
//!   streams.rs    exports and imports
//!   unread.rs     what a refused request still sends
//!   status.rs     how we do
//!   figures.rs    what tapdisks count, and what is wrong with them
//!   metrics/      Prometheus text, of attached disks too
//! ```
//!
//! Requests are blocking work: each runs on a thread of its own, a stated
//! number at once; the others wait.

mod answer;
mod disks;
mod figures;
mod jobs;
mod metrics;
pub mod openapi;
mod routes;
mod snapshots;
mod srs;
mod status;
mod streams;
mod unread;
mod vdis;

pub use self::answer::in_json;
pub use self::metrics::page;
pub use self::unread::read_rest;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use anyhow::Context;
use tokio::sync::Semaphore;

use crate::access::{Checked, Rights};
use crate::jobs::Jobs;
use crate::limits::{JOBS_AT_ONCE_MAX, REQUESTS_AT_ONCE_MAX};
use crate::manager::Manager;
use crate::turns::Turns;

/// What every handler gets.
#[derive(Debug, Clone)]
struct App {
    manager: Arc<Manager>,
    slots: Arc<Semaphore>,
    counters: Arc<Counters>,
    turns: Turns,
    jobs: Jobs,
    job_places: Arc<Semaphore>,
    figures: figures::Places,
    began: Instant,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    refused: AtomicU64,
}

/// Serves the API, once it listens after a call of `ready`, until `ended` resolves; attached disks are not concerned.
///
/// # Errors
/// The socket cannot be made.
pub async fn serve(
    manager: Arc<Manager>,
    socket: &Path,
    rights: Rights,
    ready: impl FnOnce(),
    ended: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let listener =
        Checked::bind(socket, rights).with_context(|| format!("listen on {}", socket.display()))?;
    let app = App {
        manager,
        slots: Arc::new(Semaphore::new(REQUESTS_AT_ONCE_MAX)),
        counters: Arc::default(),
        turns: Turns::default(),
        jobs: Jobs::default(),
        job_places: Arc::new(Semaphore::new(JOBS_AT_ONCE_MAX)),
        figures: figures::Places::default(),
        began: Instant::now(),
    };
    // Jobs stop then, leaving nothing: neither a stream nor a thread keeps
    // the process alive.
    let jobs = app.jobs.clone();
    let ended = async move {
        ended.await;
        jobs.cancel_all();
    };
    tracing::info!(socket = %socket.display(), "smd serves");
    ready();
    let served = axum::serve(listener, routes::router(app)).with_graceful_shutdown(ended).await;
    // Only tidiness: a socket nobody listens on says the same.
    let _ = std::fs::remove_file(socket);
    served.context("serve the API")
}
