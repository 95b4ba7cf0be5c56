//! gcd's API over a socket, as its callers see it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gc::service::{Service, Wishes};
use serde_json::Value;
use sm::attached::AttachedSr;

use super::Sr;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// An SR that a service collects, whose API is served.
pub struct Served {
    pub service: Arc<Service>,
    socket: PathBuf,
    runtime: Option<tokio::runtime::Runtime>,
    attending: Option<JoinHandle<()>>,
}

/// An answer: status, the kind of its content, and the content.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The code of a refusal, which must be JSON and say so.
    pub fn code(&self) -> String {
        assert!(self.status >= 400, "{self:?}");
        assert!(self.head.to_lowercase().contains("content-type: application/json"), "{self:?}");
        let error = &self.json()["error"];
        assert!(!error["message"].as_str().unwrap().is_empty(), "{self:?}");
        error["code"].as_str().unwrap().to_owned()
    }
}

impl Served {
    /// Serves at once what stands.
    pub fn new(sr: &Sr) -> Self {
        Self::with(sr, &Default::default())
    }

    /// Begins nothing before somebody says so.
    pub fn paused(sr: &Sr) -> Self {
        Self::with(sr, &Wishes { paused: true, ..Wishes::default() })
    }

    fn with(sr: &Sr, wishes: &Wishes) -> Self {
        let file = sr.run.parent().unwrap().join("gc.json");
        sm::state::write_json(&file, &BTreeMap::from([(sr.attached.uuid, wishes)])).unwrap();
        sm::state::write_json(&AttachedSr::file(&sr.run, sr.attached.uuid), &sr.attached).unwrap();
        let service = Service::new(sr.run.parent().unwrap(), &sr.run, gc::limits::LOOK_EVERY).unwrap();
        let thread = Arc::clone(&service);
        let attending = std::thread::spawn(move || thread.attend());
        assert_eq!(service.collectors_now(Some(sr.attached.uuid)).unwrap().len(), 1);
        let socket = sr.run.join("gcd.sock");
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(async { tokio::net::UnixListener::bind(&socket).unwrap() });
        let router = gc::api::router(Arc::clone(&service));
        runtime.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { service, socket, runtime: Some(runtime), attending: Some(attending) }
    }

    /// Asks with any words at all.
    pub fn ask(&self, method: &str, path: &str, kind: &str, body: &str) -> Answer {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let len = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: gcd\r\nconnection: close\r\n{kind}content-length: {len}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.into(), body: body.into() }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "", "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, "content-type: application/json\r\n", &body.to_string())
    }

    pub fn ok(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        answer.json()
    }

    /// What is said of the one SR.
    pub fn status(&self) -> Value {
        self.get("/status").json()["srs"][0].clone()
    }

    /// Waits until the SR's status is so.
    pub fn wait(&self, what: &str, mut done: impl FnMut(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let status = self.status();
            if done(&status) {
                return status;
            }
            assert!(begun.elapsed() < LIMIT, "waited for {what}: {status}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.service.close();
        if let Some(thread) = self.attending.take() {
            let _ = thread.join();
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
