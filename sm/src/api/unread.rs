//! A refusal reaches whoever is still sending.
//!
//! A handler that refuses early (a body that is too long, a name that exists)
//! leaves the rest of the body unread. Were the connection closed then, the
//! sender's next write would fail before it ever read the answer. So the rest
//! is read and thrown away first, as far as [`UNREAD_BYTES_MAX`] and
//! [`UNREAD_MS_MAX`] go.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt;
use tokio::sync::oneshot;

use crate::limits::{UNREAD_BYTES_MAX, UNREAD_MS_MAX};

/// Answers only when the body was read, or the limits are reached.
pub async fn read_rest(request: Request, next: Next) -> Response {
    let (back, mut given_back) = oneshot::channel();
    let response = next.run(request.map(|body| Body::new(Lent { body, back: Some(back) }))).await;
    // A handler that still reads (a stream, by a task of its own) has it yet.
    if let Ok(body) = given_back.try_recv() {
        // Past the time the connection closes as it would have at once.
        let _ = tokio::time::timeout(Duration::from_millis(UNREAD_MS_MAX), throw_away(body)).await;
    }
    response
}

async fn throw_away(mut body: Body) {
    let mut left = UNREAD_BYTES_MAX;
    while let Some(Ok(frame)) = body.frame().await {
        match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
            Some(less) => left = less,
            None => return,
        }
    }
}

/// A body that comes back when its reader is done with it and it has not ended.
struct Lent {
    body: Body,
    back: Option<oneshot::Sender<Body>>,
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(back) = self.back.take().filter(|_| !self.body.is_end_stream()) else { return };
        // Nobody waits for it where the request itself was given up.
        let _ = back.send(std::mem::take(&mut self.body));
    }
}
