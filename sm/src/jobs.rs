//! Long operations as jobs: who asked for what, how far it is, what came of
//! it.
//!
//! ```text
//!   queued ──its turn, a free place──> running ──> done | failed | cancelled
//!      └────────────cancel──────────────────────────────────────────┘
//! ```
//!
//! Jobs live in the memory of smd. One that a dead smd was carrying out is
//! gone with it; what it had changed is finished or undone by recovery, so
//! the answer to a forgotten job is found by looking at the VDI.
//!
//! Absent on purpose: threads and requests (see [`crate::api`]).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::limits::{JOBS_KEPT_MAX, JOBS_MAX};
use crate::progress::Progress;

/// What a job is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct About {
    /// Like `copy`.
    pub operation: &'static str,
    /// The SR it works on.
    pub sr: Option<Uuid>,
    /// The VDI it is about.
    pub vdi: Option<Uuid>,
}

/// Where a job stands, as the API shows it. Sizes in bytes, rates in bytes
/// per second.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum JobState {
    /// Waits for its turn on its VDI, or for a free place.
    Queued,
    /// Works.
    Running {
        /// Done so far.
        bytes_done: u64,
        /// To do in all, once known.
        bytes_total: Option<u64>,
        /// Since it began.
        rate: f64,
        /// Seconds left at that rate.
        eta_s: Option<f64>,
        /// The last point passed that others wait for: `ready` when it holds
        /// until told to proceed, `taken` once a snapshot's instant is over.
        #[serde(skip_serializing_if = "Option::is_none")]
        stage: Option<&'static str>,
    },
    /// Has succeeded.
    Done {
        /// What the operation answers.
        result: Value,
    },
    /// Has failed; nothing of it is left.
    Failed {
        /// As in any refused request.
        error: JobError,
    },
    /// Was stopped by somebody; nothing of it is left.
    Cancelled,
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JobError {
    /// The stable word.
    pub code: &'static str,
    /// The sentence.
    pub message: String,
    /// What to do next, where the code alone does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<&'static str>,
}

impl JobError {
    fn of(error: &Error) -> Self {
        Self { code: error.code(), message: error.to_string(), next: error.next() }
    }
}

/// A job as the API shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobView {
    /// Its uuid.
    pub id: Uuid,
    /// What it is about.
    #[serde(flatten)]
    pub about: About,
    /// When it was asked for, seconds since 1970.
    pub created: u64,
    /// Where it stands.
    #[serde(flatten)]
    pub state: JobState,
}

impl JobView {
    /// Whether nothing more will happen.
    #[must_use]
    pub fn ended(&self) -> bool {
        !matches!(self.state, JobState::Queued | JobState::Running { .. })
    }
}

/// All jobs of this process.
#[derive(Debug, Clone, Default)]
pub struct Jobs {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    jobs: HashMap<Uuid, Entry>,
    /// In the order they were asked for; ended ones are dropped from here.
    order: VecDeque<Uuid>,
}

#[derive(Debug)]
struct Entry {
    about: About,
    created_s: u64,
    at: Stage,
    progress: Arc<Progress>,
    /// True once it was asked to stop.
    cancel: watch::Sender<bool>,
    /// True once it has ended.
    ended: watch::Sender<bool>,
}

#[derive(Debug)]
enum Stage {
    Queued,
    Running { since: Instant },
    Ended(JobState),
}

/// A job in the hands of who carries it out. Dropped without an end (by a
/// panic, say) it counts as failed.
#[derive(Debug)]
pub struct Job {
    jobs: Jobs,
    id: Uuid,
    progress: Arc<Progress>,
}

impl Jobs {
    /// A new job, queued. The caller may choose its id, so that it can ask
    /// for it before the first answer has come.
    ///
    /// # Errors
    /// [`Error::Busy`] when there are as many as there may be,
    /// [`Error::Exists`] for an id that was used.
    pub fn add(&self, about: About, id: Option<Uuid>) -> Result<Job> {
        let id = id.unwrap_or_else(Uuid::new_v4);
        let mut table = self.table();
        if table.jobs.contains_key(&id) {
            return Err(Error::Exists { what: format!("job {id}") });
        }
        let alive = table.jobs.values().filter(|entry| !matches!(entry.at, Stage::Ended(_))).count();
        if alive >= JOBS_MAX {
            return Err(Error::Busy { reason: format!("{JOBS_MAX} jobs are under way") });
        }
        let progress = Arc::<Progress>::default();
        let created_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (cancel, ended) = (watch::Sender::new(false), watch::Sender::new(false));
        let entry = Entry { about, created_s, at: Stage::Queued, progress: progress.clone(), cancel, ended };
        table.jobs.insert(id, entry);
        table.order.push_back(id);
        table.forget_oldest();
        Ok(Job { jobs: self.clone(), id, progress })
    }

    /// All jobs, newest first.
    #[must_use]
    pub fn list(&self) -> Vec<JobView> {
        let table = self.table();
        table.order.iter().rev().filter_map(|id| Some(view(*id, table.jobs.get(id)?))).collect()
    }

    /// One job.
    ///
    /// # Errors
    /// [`Error::NotFound`], also for one that is forgotten.
    pub fn show(&self, id: Uuid) -> Result<JobView> {
        self.with(id, |entry| view(id, entry))
    }

    /// One job, as soon as it has ended or the time is up.
    ///
    /// # Errors
    /// As [`Self::show`].
    pub async fn wait(&self, id: Uuid, limit: Duration) -> Result<JobView> {
        let mut ended = self.with(id, |entry| entry.ended.subscribe())?;
        // Time up, or forgotten: either way it is shown as it is.
        let _ = tokio::time::timeout(limit, ended.wait_for(|ended| *ended)).await;
        self.show(id)
    }

    /// Asks a job to stop; fine if it has ended. It does so at the next point
    /// where nothing is left behind.
    ///
    /// # Errors
    /// As [`Self::show`].
    pub fn cancel(&self, id: Uuid) -> Result<JobView> {
        self.with(id, |entry| {
            entry.progress.cancel();
            entry.cancel.send_replace(true);
            view(id, entry)
        })
    }

    /// Tells a job that holds to go on.
    ///
    /// # Errors
    /// As [`Self::show`].
    pub fn proceed(&self, id: Uuid) -> Result<JobView> {
        self.with(id, |entry| {
            entry.progress.proceed();
            view(id, entry)
        })
    }

    /// Resolves when somebody asks a job to stop.
    pub async fn cancelled(&self, id: Uuid) {
        match self.with(id, |entry| entry.cancel.subscribe()) {
            Ok(mut asked) => drop(asked.wait_for(|asked| *asked).await),
            // Only ended jobs are forgotten.
            Err(_) => std::future::pending().await,
        }
    }

    /// Asks all of them.
    pub fn cancel_all(&self) {
        for entry in self.table().jobs.values() {
            entry.progress.cancel();
            entry.cancel.send_replace(true);
        }
    }

    /// Jobs that wait and jobs that work.
    #[must_use]
    pub fn alive(&self) -> (usize, usize) {
        let table = self.table();
        let count = |wanted: fn(&Stage) -> bool| table.jobs.values().filter(|e| wanted(&e.at)).count();
        (count(|at| matches!(at, Stage::Queued)), count(|at| matches!(at, Stage::Running { .. })))
    }

    fn with<T>(&self, id: Uuid, look: impl FnOnce(&mut Entry) -> T) -> Result<T> {
        let mut table = self.table();
        let entry = table.jobs.get_mut(&id);
        let entry = entry.ok_or_else(|| Error::NotFound { what: format!("job {id}") })?;
        Ok(look(entry))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change is whole before anything can panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn forget_oldest(&mut self) {
        let ended = |id: &Uuid| self.jobs.get(id).is_some_and(|entry| matches!(entry.at, Stage::Ended(_)));
        let ended: Vec<Uuid> = self.order.iter().copied().filter(ended).collect();
        let too_many = ended.len().saturating_sub(JOBS_KEPT_MAX);
        for id in &ended[..too_many] {
            self.jobs.remove(id);
        }
        let jobs = &self.jobs;
        self.order.retain(|id| jobs.contains_key(id));
    }
}

fn view(id: Uuid, entry: &Entry) -> JobView {
    let state = match &entry.at {
        Stage::Queued => JobState::Queued,
        Stage::Running { since } => running(&entry.progress, since.elapsed()),
        Stage::Ended(state) => state.clone(),
    };
    JobView { id, about: entry.about.clone(), created: entry.created_s, state }
}

fn running(progress: &Progress, elapsed: Duration) -> JobState {
    let (bytes_done, bytes_total) = (progress.done_bytes(), progress.total_bytes());
    #[expect(clippy::cast_precision_loss, reason = "shown to people")]
    let rate = bytes_done as f64 / elapsed.as_secs_f64().max(1e-3);
    #[expect(clippy::cast_precision_loss, reason = "shown to people")]
    let eta_s =
        bytes_total.filter(|_| rate > 0.0).map(|total| total.saturating_sub(bytes_done) as f64 / rate);
    JobState::Running { bytes_done, bytes_total, rate, eta_s, stage: progress.stage() }
}

impl Job {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// It works from now on.
    pub fn begin(&self) {
        // An entry that is alive is there.
        let _ = self.jobs.with(self.id, |entry| entry.at = Stage::Running { since: Instant::now() });
    }

    /// It has ended so.
    pub fn end(self, outcome: Result<Value, &Error>) {
        self.note(match outcome {
            Ok(result) => JobState::Done { result },
            Err(Error::Cancelled) => JobState::Cancelled,
            Err(error) => JobState::Failed { error: JobError::of(error) },
        });
    }

    fn note(&self, state: JobState) {
        let _ = self.jobs.with(self.id, |entry| {
            if !matches!(entry.at, Stage::Ended(_)) {
                entry.at = Stage::Ended(state);
                entry.ended.send_replace(true);
            }
        });
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let lost = Error::NotRunning { what: "the job".into(), reason: "it ended without an answer".into() };
        self.note(JobState::Failed { error: JobError::of(&lost) });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn about() -> About {
        About { operation: "copy", sr: None, vdi: None }
    }

    #[test]
    fn a_job_is_shown_in_each_of_its_states() {
        let jobs = Jobs::default();
        let job = jobs.add(about(), None).unwrap();
        let id = job.id();
        assert_eq!(jobs.show(id).unwrap().state, JobState::Queued);
        job.begin();
        job.progress().expect(100);
        job.progress().add(40);
        let JobState::Running { bytes_done: 40, bytes_total: Some(100), rate, eta_s: Some(eta_s), .. } =
            jobs.show(id).unwrap().state
        else {
            panic!("{:?}", jobs.show(id))
        };
        assert!(rate > 0.0 && eta_s > 0.0);
        job.end(Ok(json!({"uuid": "x"})));
        let shown = serde_json::to_value(jobs.show(id).unwrap()).unwrap();
        assert_eq!(shown["state"], "done");
        assert_eq!(shown["result"]["uuid"], "x");
        assert_eq!(shown["operation"], "copy");
    }

    #[test]
    fn failures_and_lost_jobs_say_why() {
        let jobs = Jobs::default();
        let job = jobs.add(about(), None).unwrap();
        let failed = job.id();
        job.end(Err(&Error::NoSpace { what: "x".into() }));
        let shown = serde_json::to_value(jobs.show(failed).unwrap()).unwrap();
        assert_eq!((&shown["state"], &shown["error"]["code"]), (&json!("failed"), &json!("NO_SPACE")));
        let lost = jobs.add(about(), None).unwrap().id();
        assert!(matches!(jobs.show(lost).unwrap().state, JobState::Failed { .. }));
        assert_eq!(jobs.add(about(), Some(lost)).unwrap_err().code(), "EXISTS");
    }

    #[tokio::test]
    async fn a_cancelled_job_hears_of_it_and_who_waits_sees_the_end() {
        let jobs = Jobs::default();
        let job = jobs.add(about(), None).unwrap();
        let id = job.id();
        jobs.cancel(id).unwrap();
        jobs.cancelled(id).await;
        let stopped = job.progress().go_on();
        let waits = tokio::spawn({
            let jobs = jobs.clone();
            async move { jobs.wait(id, Duration::from_secs(30)).await }
        });
        job.end(stopped.as_ref().map(|()| Value::Null));
        assert_eq!(waits.await.unwrap().unwrap().state, JobState::Cancelled);
    }

    #[test]
    fn the_living_and_the_remembered_are_bounded() {
        let jobs = Jobs::default();
        let alive: Vec<_> = (0..JOBS_MAX).map(|_| jobs.add(about(), None).unwrap()).collect();
        assert_eq!(jobs.add(about(), None).unwrap_err().code(), "BUSY");
        let first = alive[0].id();
        drop(alive);
        for _ in 0..JOBS_KEPT_MAX + 1 {
            jobs.add(about(), None).unwrap().end(Ok(Value::Null));
        }
        assert!(jobs.list().len() <= JOBS_KEPT_MAX + 1);
        assert_eq!(jobs.show(first).unwrap_err().code(), "NOT_FOUND");
    }
}
