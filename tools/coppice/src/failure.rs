//! How a command fails: a stable word, a sentence, and what to do next.

use serde_json::{Map, Value, json};

/// A refused or failed request; the program ends with status 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// Stable upper-case word.
    pub code: String,
    /// What happened, to which image.
    pub message: String,
    /// Whatever else the daemon said, handed on in JSON.
    pub more: Map<String, Value>,
}

impl Failure {
    /// A failure with nothing more to say.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into(), more: Map::new() }
    }

    /// The document printed with `--json`.
    pub fn document(&self) -> Value {
        let mut error = self.more.clone();
        error.insert("code".to_owned(), json!(self.code));
        error.insert("message".to_owned(), json!(self.message));
        json!({ "error": error })
    }

    /// Reads a daemon's answer with a failing status.
    pub fn from_answer(status: u16, body: &[u8]) -> Self {
        let parsed: Option<Value> = serde_json::from_slice(body).ok();
        let error = parsed.and_then(|mut v| match v.get_mut("error").map(Value::take) {
            Some(Value::Object(map)) => Some(map),
            _ => None,
        });
        let Some(mut more) = error else {
            let text = String::from_utf8_lossy(body);
            let text = text.trim();
            let message = format!("the daemon answered with status {status}: {text}");
            return Self::new("IO_ERROR", message);
        };
        let mut text = |key: &str, otherwise: &str| match more.remove(key) {
            Some(Value::String(s)) => s,
            _ => otherwise.to_owned(),
        };
        let code = text("code", "IO_ERROR");
        let message = text("message", "the daemon gave no reason");
        Self { code, message, more }
    }

    /// What the operator can do: what the daemon said of this case, else what
    /// fits the code.
    pub fn advice(&self) -> Option<&str> {
        if let Some(next) = self.more.get("next").and_then(Value::as_str) {
            return Some(next);
        }
        Some(match self.code.as_str() {
            "NOT_RUNNING" if self.message.contains("tapdisk") => {
                "its log is in the run folder, tap/UUID/log; `coppice sr check` reads its images"
            }
            "NOT_RUNNING" => {
                "start the daemons (`coppice up`, or the smd and gcd services), or name their folder with --run"
            }
            "NOT_FOUND" => "`coppice sr list` and `coppice vdi list` show what there is",
            "AMBIGUOUS" => "say the uuid instead of the name",
            "EXISTS" => "choose another name or uuid",
            "IN_USE" => "detach it where it is attached (`coppice vdi detach`), then try again",
            "BUSY" => "wait for the running operation (`coppice status` shows it), then try again",
            "NO_SPACE" => {
                "free space on the storage repository, or delete snapshots and run `coppice gc run --wait`"
            }
            "CHAIN_TOO_LONG" => "delete snapshots you no longer need and run `coppice gc run --wait`",
            "HOOK_FAILED" => {
                "look at what the hook said above; a guest may still be frozen if the after hook failed"
            }
            "WRONG_BASE" => {
                "name the disk or snapshot that holds what the delta was made over, or import a full export first"
            }
            "SR_DETACHED" => "attach it first: `coppice sr attach`",
            "SR_IN_USE" => "detach it on the host that uses it",
            "BAD_IMAGE" => {
                "it is left untouched; `coppice sr check` names all there are: restore it from a backup"
            }
            "MISSING_PARENT" => {
                "put the missing image back into the storage repository, then `coppice sr scan`"
            }
            "PARENT_OUTSIDE_SR" => {
                "move the parent into the storage repository and correct the link; nothing outside is ever read"
            }
            "READ_ONLY" => {
                "snapshots and read-only folders take no writes; clone the snapshot, or check the mount and its permissions"
            }
            "BAD_SIZE" => "a disk has 2 MiB to 2040 GiB, in steps of 2 MiB",
            "BAD_JOURNAL" => "a newer version may have written it: use that, nothing is changed until then",
            "IO_ERROR" => "the log of smd and that of the kernel (`dmesg`) may say more",
            "UNSUPPORTED" => "`coppice help` shows what there is",
            _ => return None,
        })
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

impl std::error::Error for Failure {}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new("IO_ERROR", error.to_string())
    }
}

/// What every command comes to.
pub type Outcome<T> = Result<T, Failure>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_answer_keeps_what_else_was_said() {
        let body = br#"{"error":{"code":"BAD_IMAGE","message":"x: no footer","image":"x"}}"#;
        let failure = Failure::from_answer(400, body);
        assert_eq!(failure.code, "BAD_IMAGE");
        assert_eq!(failure.document()["error"]["image"], "x");
    }

    #[test]
    fn what_the_daemon_says_to_do_next_is_said_instead_of_what_fits_the_code() {
        let plain = Failure::from_answer(409, br#"{"error":{"code":"IN_USE","message":"x"}}"#);
        assert!(plain.advice().unwrap().contains("vdi detach"));
        let body = br#"{"error":{"code":"IN_USE","message":"x","next":"disconnect its clients"}}"#;
        assert_eq!(Failure::from_answer(409, body).advice(), Some("disconnect its clients"));
    }

    #[test]
    fn an_answer_that_is_no_document_is_still_an_error() {
        let failure = Failure::from_answer(404, b"Not Found");
        assert_eq!(failure.code, "IO_ERROR");
        assert!(failure.message.contains("404"), "{failure}");
    }
}
