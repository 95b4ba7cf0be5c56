//! Bytes as they come.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::buffer::Pool;
use crate::engine::Extent;
use crate::nbd::{Connection, Export, Piece, Security};

/// Plays a client that sends `bytes` and a disk that answers
/// some requests at once, some later and some never. Must not panic.
pub fn raw(bytes: &[u8]) {
    let export = Export {
        name: "disk".to_owned(),
        description: "fuzzed".to_owned(),
        virtual_bytes: 1 << 30,
        read_only: bytes.first().is_some_and(|byte| byte & 1 != 0),
        fast_zero: true,
    };
    let pool = Pool::default();
    let mut connection = Connection::new(Arc::new(export), Security::Offered, pool.clone());
    let mut late = VecDeque::new();
    for (n, piece) in bytes.chunks(97).enumerate() {
        let mut rest = piece;
        while !rest.is_empty() {
            while let Some(request) = connection.next_request() {
                late.push_back(request);
            }
            let space = connection.input_space();
            let fits = space.len().min(rest.len());
            if fits == 0 {
                break;
            }
            let (now, later) = rest.split_at(fits);
            if let Some(space) = space.get_mut(..fits) {
                space.copy_from_slice(now);
            }
            connection.input_filled(fits);
            rest = later;
        }
        if n % 3 == 0
            && let Some(request) = late.pop_front()
        {
            let extents = [Extent { len: u64::MAX, depth: n as u32 % 3 }];
            connection.finish(request.slot, Ok(()), &extents);
            let len = connection.output.iter().map(Piece::len).sum::<usize>() / 2;
            connection.output_written(len);
        }
    }
    connection.input_ended();
    connection.abandon();
    for request in late {
        connection.finish(request.slot, Err(libc::EIO), &[]);
    }
    assert_eq!(pool.used_bytes(), 0, "a buffer was lost");
}
