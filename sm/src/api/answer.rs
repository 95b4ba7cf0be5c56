//! Results and errors as JSON.

use axum::Json;
use axum::body::to_bytes;
use axum::http::StatusCode;
use axum::http::header::{ALLOW, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;

use crate::error::Error;
use crate::limits::REFUSAL_BYTES_MAX;

/// What a handler gives back.
pub type Outcome = std::result::Result<Response, Failure>;

/// An error on its way out: `{"error": {"code", "message"}}`, with `next`
/// where there is something to do that the code alone does not tell.
#[derive(Debug)]
pub struct Failure(pub Error);

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

/// A document.
pub fn document(value: impl Serialize) -> Outcome {
    Ok(Json(value).into_response())
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut error = json!({ "code": self.0.code(), "message": self.0.to_string() });
        if let Error::ChainTooLong { depth, depth_max, .. } = &self.0 {
            error["depth"] = (*depth).into();
            error["depth_max"] = (*depth_max).into();
        }
        if let Some(next) = self.0.next() {
            error["next"] = next.into();
        }
        (status(&self.0), Json(json!({ "error": error }))).into_response()
    }
}

/// Gives what the router itself refuses (no such path, another method, a body
/// or a query that cannot be read), as text or without a word, the form of
/// every other error.
pub async fn in_json(response: Response) -> Response {
    let status = response.status();
    let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let told = kind.is_some_and(|kind| kind.starts_with("application/json"));
    if told || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (head, body) = response.into_parts();
    // A text that is too long, or broke off, leaves the status to say it all.
    let text = to_bytes(body, REFUSAL_BYTES_MAX).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let otherwise = status.canonical_reason().unwrap_or("refused");
    let said = if text.is_empty() { otherwise } else { text.trim() };
    let (code, message) = match status {
        StatusCode::NOT_FOUND => ("NOT_FOUND", "there is no such request; see /openapi.json"),
        StatusCode::METHOD_NOT_ALLOWED => {
            ("BAD_REQUEST", "what this path is asked for takes another method; see /openapi.json")
        }
        _ if status.is_server_error() => ("IO_ERROR", said),
        _ => ("BAD_REQUEST", said),
    };
    let error = json!({ "code": code, "message": message });
    let mut answer = (status, Json(json!({ "error": error }))).into_response();
    if let Some(methods) = head.headers.get(ALLOW) {
        answer.headers_mut().insert(ALLOW, methods.clone());
    }
    answer
}

fn status(error: &Error) -> StatusCode {
    match error {
        Error::NotFound { .. } => StatusCode::NOT_FOUND,
        Error::BadRequest { .. } | Error::BadSize { .. } => StatusCode::BAD_REQUEST,
        Error::Unsupported { .. } => StatusCode::NOT_IMPLEMENTED,
        Error::NoSpace { .. } => StatusCode::INSUFFICIENT_STORAGE,
        Error::Busy { .. } | Error::NotRunning { .. } => StatusCode::SERVICE_UNAVAILABLE,
        Error::Io { .. } | Error::Catalog(_) | Error::Journal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::CONFLICT,
    }
}
