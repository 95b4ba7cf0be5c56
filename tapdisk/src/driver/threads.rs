//! A pool of threads that carry out operations with blocking calls.
//!
//! Results come back through a channel; a [`Waker`] makes the owner's `poll`
//! return once for each batch of them.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};

use super::Job;
use super::exec::{Failure, Work};
use crate::engine::{Completion, OpId};
use crate::limits::{JOB_WORKERS, WORKERS};

/// What a thread brought to an end.
#[derive(Debug)]
pub enum Ended<D> {
    /// An operation.
    Op(OpId, Result<Completion, Failure>),
    /// A background job.
    Job(D),
}

/// The threads. Dropping it waits for what they are doing.
///
/// The two queues in front of them have no limit of their own: they hold no
/// more than the engine has in flight, which the limits on guest requests and
/// the one window of a merge bound.
pub struct Workers<D> {
    ops: Option<Sender<(OpId, Work)>>,
    jobs: Option<Sender<Job<D>>>,
    ended: Receiver<Ended<D>>,
    waker: Arc<Waker>,
    threads: Vec<JoinHandle<()>>,
}

impl<D: Send + 'static> Workers<D> {
    /// Starts the threads, each inside the caller's tracing span.
    ///
    /// # Errors
    /// What the system says when it has no thread or descriptor left.
    pub fn start() -> io::Result<Self> {
        let (ops, ops_queue) = crossbeam_channel::unbounded();
        let (jobs, jobs_queue) = crossbeam_channel::unbounded();
        let (ended_queue, ended) = crossbeam_channel::unbounded();
        let mut workers = Self {
            ops: Some(ops),
            jobs: Some(jobs),
            ended,
            waker: Arc::new(Waker::new()?),
            threads: Vec::new(),
        };
        for i in 0..WORKERS {
            let name = format!("io-{i}");
            workers.spawn(name, ops_queue.clone(), ended_queue.clone(), |(id, work)| {
                Ended::Op(id, Work::run(work))
            })?;
        }
        for i in 0..JOB_WORKERS {
            let name = format!("job-{i}");
            workers.spawn(name, jobs_queue.clone(), ended_queue.clone(), |job: Job<D>| Ended::Job(job()))?;
        }
        Ok(workers)
    }

    fn spawn<T: Send + 'static>(
        &mut self,
        name: String,
        queue: Receiver<T>,
        ended: Sender<Ended<D>>,
        run: fn(T) -> Ended<D>,
    ) -> io::Result<()> {
        let waker = Arc::clone(&self.waker);
        let span = tracing::Span::current();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _span = span.entered();
            let _fuse = AbortOnPanic;
            for task in queue {
                if ended.send(run(task)).is_err() {
                    return;
                }
                waker.wake();
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Starts an operation.
    pub fn start_op(&self, id: OpId, work: Work) {
        if let Some(ops) = &self.ops {
            // Cannot fail: the threads end only after the sender is gone.
            let _ = ops.send((id, work));
        }
    }

    /// Starts a background job.
    pub fn start_job(&self, job: Job<D>) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job); // as above
        }
    }

    /// The next thing that ended, if any did.
    #[must_use]
    pub fn next_ended(&self) -> Option<Ended<D>> {
        self.ended.try_recv().ok()
    }

    /// Readable once something has ended. Call [`Workers::drain_wake`] before
    /// taking what ended, else a wake-up can be lost.
    #[must_use]
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.waker.read.as_fd()
    }

    /// Stops waiting for the threads when this is dropped: one of them may
    /// hang in the kernel.
    pub fn detach(&mut self) {
        self.threads.clear();
    }

    /// Makes [`Workers::wake_fd`] readable, for work that was left over.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Makes [`Workers::wake_fd`] unreadable until something more ends.
    pub fn drain_wake(&self) {
        self.waker.drain();
    }
}

impl<D> Drop for Workers<D> {
    fn drop(&mut self) {
        (self.ops, self.jobs) = (None, None);
        for thread in self.threads.drain(..) {
            // A thread that panicked has taken the process with it.
            let _ = thread.join();
        }
    }
}

/// An operation lost to a panic would hang its guest for ever. The death of
/// the process is the case everything else is built to survive.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a worker panicked; ending the process");
            std::process::abort();
        }
    }
}

/// Makes a `poll` return.
#[derive(Debug)]
struct Waker {
    read: UnixStream,
    write: UnixStream,
    /// A byte is in the pipe, or will be in a moment.
    awake: AtomicBool,
}

impl Waker {
    fn new() -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        write.set_nonblocking(true)?;
        Ok(Self { read, write, awake: AtomicBool::new(false) })
    }

    fn wake(&self) {
        if !self.awake.swap(true, Ordering::AcqRel) {
            // At most one byte is ever there, so there is room.
            let _ = (&self.write).write(&[1]);
        }
    }

    fn drain(&self) {
        let mut byte = [0; 8];
        let _ = (&self.read).read(&mut byte);
        // Last: whoever sees `false` writes a new byte, and whoever saw
        // `true` before had sent its result before, which the caller takes
        // after this.
        self.awake.swap(false, Ordering::AcqRel);
    }
}
