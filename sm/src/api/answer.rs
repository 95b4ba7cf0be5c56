//! Results and errors as JSON.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;

use crate::error::Error;

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
