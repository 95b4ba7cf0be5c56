//! A client's socket, with or without TLS; never blocks.
//!
//! Absent on purpose: the decision when TLS begins (the client asks for it
//! within the NBD handshake).

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;
use nix::sys::socket::{setsockopt, sockopt};
use openssl::ssl::{ErrorCode, SslStream};

use crate::limits::{TCP_PROBE, TCP_UNACKNOWLEDGED_MAX, TLS_RECORD_BYTES};
use crate::tls::{Tls, client_name};

/// A connected socket, non-blocking.
#[derive(Debug)]
pub enum Socket {
    /// On this host.
    Unix(UnixStream),
    /// From anywhere.
    Tcp(TcpStream),
}

impl Socket {
    /// Takes an accepted TCP socket: replies leave at once, and a peer whose
    /// host has died is noticed.
    ///
    /// # Errors
    /// What the system says.
    pub fn from_tcp(socket: TcpStream) -> io::Result<Self> {
        let (idle, pause, probes) = TCP_PROBE;
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        setsockopt(&socket, sockopt::KeepAlive, &true)?;
        setsockopt(&socket, sockopt::TcpKeepIdle, &(idle.as_secs() as u32))?;
        setsockopt(&socket, sockopt::TcpKeepInterval, &(pause.as_secs() as u32))?;
        setsockopt(&socket, sockopt::TcpKeepCount, &probes)?;
        setsockopt(&socket, sockopt::TcpUserTimeout, &(TCP_UNACKNOWLEDGED_MAX.as_millis() as u32))?;
        Ok(Self::Tcp(socket))
    }

    fn half_close(&self) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.shutdown(Shutdown::Write),
            Self::Tcp(socket) => socket.shutdown(Shutdown::Write),
        }
    }

    fn shutdown(&self) {
        // Whatever else still holds the socket, the peer hears of it now.
        let _ = match self {
            Self::Unix(socket) => socket.shutdown(Shutdown::Both),
            Self::Tcp(socket) => socket.shutdown(Shutdown::Both),
        };
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.as_fd(),
            Self::Tcp(socket) => socket.as_fd(),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => socket.read(to),
            Self::Tcp(socket) => socket.read(to),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => socket.write(from),
            Self::Tcp(socket) => socket.write(from),
        }
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => socket.write_vectored(from),
            Self::Tcp(socket) => socket.write_vectored(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How bytes get to a client and back. [`io::ErrorKind::WouldBlock`] is never
/// an end: [`Transport::wants`] says what to wait for besides the obvious.
#[derive(Debug)]
pub enum Transport {
    /// As they are.
    Plain(Socket),
    /// Encrypted.
    Tls(Box<Encrypted>),
}

/// A socket with TLS.
#[derive(Debug)]
pub struct Encrypted {
    stream: SslStream<Socket>,
    /// The handshake is over.
    ready: bool,
    /// What the last call could not go on without.
    wants: PollFlags,
    /// Small pieces are put together here: each write becomes a record.
    record: Vec<u8>,
}

impl Transport {
    /// Begins TLS; the client's first words are still to come.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn start_tls(self, tls: &Tls) -> io::Result<Self> {
        let Self::Plain(socket) = self else { return Ok(self) };
        let session = tls.session()?;
        let stream = SslStream::new(session, socket)?;
        let (wants, record) = (PollFlags::POLLIN, Vec::with_capacity(TLS_RECORD_BYTES));
        Ok(Self::Tls(Box::new(Encrypted { stream, ready: false, wants, record })))
    }

    /// Whether a TLS handshake is under way.
    pub fn is_shaking(&self) -> bool {
        matches!(self, Self::Tls(encrypted) if !encrypted.ready)
    }

    /// Takes the TLS handshake a step further; whether it is over. The name
    /// of the client goes to the log.
    ///
    /// # Errors
    /// The handshake failed.
    pub fn shake(&mut self) -> io::Result<bool> {
        let Self::Tls(encrypted) = self else { return Ok(true) };
        match encrypted.stream.accept() {
            Ok(()) => {
                encrypted.ready = true;
                encrypted.wants = PollFlags::empty();
                let session = encrypted.stream.ssl();
                let (version, name) = (session.version_str(), client_name(session));
                tracing::info!(version, name, "TLS");
                Ok(true)
            }
            Err(error) => match encrypted.cannot(error) {
                Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
                Err(error) => Err(error),
            },
        }
    }

    /// What to poll for, besides what the connection wants.
    pub fn wants(&self) -> PollFlags {
        match self {
            Self::Plain(_) => PollFlags::empty(),
            Self::Tls(encrypted) => encrypted.wants,
        }
    }

    /// Bytes that are here already, though the socket may have nothing.
    pub fn pending(&self) -> usize {
        match self {
            Self::Plain(_) => 0,
            Self::Tls(encrypted) => encrypted.stream.ssl().pending(),
        }
    }

    /// Reads; 0 at the end.
    pub fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(to),
            Self::Tls(encrypted) => match encrypted.stream.ssl_read(to) {
                Ok(n) => {
                    encrypted.wants = PollFlags::empty();
                    Ok(n)
                }
                Err(error) => encrypted.cannot(error),
            },
        }
    }

    /// Writes as much of `pieces` as goes.
    pub fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write_vectored(pieces),
            Self::Tls(encrypted) => encrypted.write(pieces),
        }
    }

    /// Whether a short read means that there is no more.
    pub fn reads_all(&self) -> bool {
        matches!(self, Self::Plain(_))
    }

    fn socket(&self) -> &Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(encrypted) => encrypted.stream.get_ref(),
        }
    }

    /// Closes our half: the peer reads what was sent, and then the end.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn half_close(&self) -> io::Result<()> {
        self.socket().half_close()
    }

    /// Reads and drops what has come, encrypted or not, about `bytes_max` at
    /// most; `false` at the end.
    pub fn drain(&mut self, bytes_max: usize) -> bool {
        let socket = match self {
            Self::Plain(socket) => socket,
            Self::Tls(encrypted) => encrypted.stream.get_mut(),
        };
        let mut dropped = [0; 4096];
        for _ in 0..bytes_max.div_ceil(dropped.len()) {
            match socket.read(&mut dropped) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }

    /// Says goodbye and closes.
    pub fn close(self) {
        match self {
            Self::Plain(socket) => socket.shutdown(),
            Self::Tls(mut encrypted) => {
                if encrypted.ready {
                    let _ = encrypted.stream.shutdown(); // a courtesy
                }
                encrypted.stream.get_ref().shutdown();
            }
        }
    }
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

impl Encrypted {
    /// A call that would block is made again with the same bytes at the
    /// front, perhaps more of them: the connection takes nothing back.
    fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.record.clear();
        for piece in pieces {
            let room = TLS_RECORD_BYTES - self.record.len();
            self.record.extend_from_slice(piece.get(..room.min(piece.len())).unwrap_or_default());
            if self.record.len() == TLS_RECORD_BYTES {
                break;
            }
        }
        match self.stream.ssl_write(&self.record) {
            Ok(n) => {
                self.wants = PollFlags::empty();
                Ok(n)
            }
            Err(error) => self.cannot(error),
        }
    }

    fn cannot(&mut self, error: openssl::ssl::Error) -> io::Result<usize> {
        self.wants = match error.code() {
            ErrorCode::WANT_READ => PollFlags::POLLIN,
            ErrorCode::WANT_WRITE => PollFlags::POLLOUT,
            ErrorCode::ZERO_RETURN => return Ok(0),
            _ => {
                self.wants = PollFlags::empty();
                // Never spoken to again: the library forbids it.
                self.ready = false;
                return Err(error.into_io_error().unwrap_or_else(io::Error::other));
            }
        };
        Err(io::ErrorKind::WouldBlock.into())
    }
}
