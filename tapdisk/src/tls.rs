//! Whom a TLS client is shown, and what it must show.
//!
//! Two ways, and both at once if wanted: X.509 certificates, of the server
//! and, with [`Settings::verify_peer`], of each client; and pre-shared keys,
//! which say by themselves who the client is. Names of files and the format of
//! keys are what other NBD servers and clients use.
//!
//! At least TLS 1.2; no renegotiation, no tickets, no compression: one
//! handshake for each connection, which is what the limits count.
//!
//! Files that change are read again, for new connections: see [`reload`].
//!
//! Absent on purpose: sockets, waiting ([`crate::server`] has both).

mod reload;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use openssl::error::ErrorStack;
use openssl::ssl::{
    Ssl, SslContext, SslContextBuilder, SslFiletype, SslMethod, SslMode, SslOptions, SslRef,
    SslSessionCacheMode, SslVerifyMode, SslVersion,
};
use openssl::x509::X509;

use crate::limits::{PSK_FILE_BYTES_MAX, PSK_KEY_BYTES_MAX, PSK_KEY_BYTES_MIN};

/// The authority whose signature on a client's certificate counts.
const CA_CERT: &str = "ca-cert.pem";
/// Our certificate, and those between it and the authority.
const SERVER_CERT: &str = "server-cert.pem";
/// Our private key.
const SERVER_KEY: &str = "server-key.pem";

/// A pre-shared key belongs to a hash, and those made by the usual tools to
/// SHA-256: only these suites can use it.
const PSK_SUITES: &str = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";
/// For clients without TLS 1.3: authenticated encryption and forward secrecy.
const CIPHERS: &str = "ECDHE+AESGCM:ECDHE+CHACHA20";

/// What was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// A folder with `server-cert.pem`, `server-key.pem` and, if clients are
    /// verified, `ca-cert.pem`.
    pub certificates: Option<PathBuf>,
    /// Clients must have a certificate of the authority.
    pub verify_peer: bool,
    /// A file with lines `user:key`, the key in hexadecimal digits.
    pub psk: Option<PathBuf>,
}

/// Why TLS cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Settings that contradict each other.
    #[error("{0}")]
    Settings(&'static str),
    /// A file cannot be read.
    #[error("{}: {error}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A certificate or key is not what its name says, or does not fit.
    #[error("{}: {error}", path.display())]
    Certificate {
        /// Which.
        path: PathBuf,
        /// What the library says.
        error: ErrorStack,
    },
    /// A line of the file of keys.
    #[error("{} line {line}: {what}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// The library refused.
    #[error("TLS: {0}")]
    Library(#[from] ErrorStack),
}

/// Ready to shake hands; a clone is another handle.
#[derive(Clone)]
pub struct Tls(Arc<RwLock<SslContext>>);

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls") // there are keys in it
    }
}

impl Tls {
    /// Reads what the settings name; `None` if they name nothing.
    ///
    /// # Errors
    /// Which file or setting is wrong, and how.
    pub fn load(settings: &Settings) -> Result<Option<Self>, TlsError> {
        Ok(context(settings)?.map(|context| Self(Arc::new(RwLock::new(context)))))
    }

    /// The state of a new connection, on our side.
    ///
    /// # Errors
    /// When the library has no memory.
    pub fn session(&self) -> Result<Ssl, ErrorStack> {
        // Only ever replaced as a whole.
        let context = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut session = Ssl::new(&context)?;
        session.set_accept_state();
        Ok(session)
    }
}

/// Reads what the settings name, and checks that it fits together.
fn context(settings: &Settings) -> Result<Option<SslContext>, TlsError> {
    if settings.verify_peer && settings.certificates.is_none() {
        return Err(TlsError::Settings("verifying clients needs a folder of certificates"));
    }
    if settings.psk.is_some() && settings.certificates.is_some() && !settings.verify_peer {
        let text = "with certificates that clients need not have, pre-shared keys protect nothing: \
            verify clients, or leave out one of the two";
        return Err(TlsError::Settings(text));
    }
    if settings.psk.is_none() && settings.certificates.is_none() {
        return Ok(None);
    }
    let mut context = SslContextBuilder::new(SslMethod::tls_server())?;
    context.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    context.set_options(
        SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_TICKET
            | SslOptions::NO_COMPRESSION
            | SslOptions::CIPHER_SERVER_PREFERENCE,
    );
    context.set_num_tickets(0)?;
    context.set_session_cache_mode(SslSessionCacheMode::OFF);
    context.set_mode(
        SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER | SslMode::RELEASE_BUFFERS,
    );
    context.set_cipher_list(CIPHERS)?;
    if let Some(folder) = &settings.certificates {
        use_certificates(&mut context, folder, settings.verify_peer)?;
    }
    if let Some(path) = &settings.psk {
        use_keys(&mut context, read_keys(path)?)?;
        if settings.certificates.is_none() {
            // Without a certificate there is nothing to fall back to.
            context.set_min_proto_version(Some(SslVersion::TLS1_3))?;
        }
    }
    Ok(Some(context.build()))
}

/// Whom the client says it is, once the handshake is over: for the log.
#[must_use]
pub fn client_name(session: &SslRef) -> Option<String> {
    let certificate = session.peer_certificate()?;
    Some(format!("{:?}", certificate.subject_name()))
}

fn use_certificates(
    context: &mut SslContextBuilder,
    folder: &Path,
    verify_peer: bool,
) -> Result<(), TlsError> {
    let check = |name: &str, result: Result<(), ErrorStack>| {
        result.map_err(|error| TlsError::Certificate { path: folder.join(name), error })
    };
    let there = |name: &str| {
        let path = folder.join(name);
        // Only to tell a missing file from a broken one.
        std::fs::File::open(&path).map(drop).map_err(|error| TlsError::Read { path, error })
    };
    there(SERVER_CERT)?;
    there(SERVER_KEY)?;
    check(SERVER_CERT, context.set_certificate_chain_file(folder.join(SERVER_CERT)))?;
    check(SERVER_KEY, context.set_private_key_file(folder.join(SERVER_KEY), SslFiletype::PEM))?;
    check(SERVER_KEY, context.check_private_key())?;
    if verify_peer {
        there(CA_CERT)?;
        let bytes = std::fs::read(folder.join(CA_CERT))
            .map_err(|error| TlsError::Read { path: folder.join(CA_CERT), error })?;
        check(CA_CERT, X509::stack_from_pem(&bytes).map(drop))?;
        check(CA_CERT, context.set_ca_file(folder.join(CA_CERT)))?;
        context.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
    }
    Ok(())
}

fn use_keys(context: &mut SslContextBuilder, keys: HashMap<Vec<u8>, Vec<u8>>) -> Result<(), TlsError> {
    context.set_ciphersuites(PSK_SUITES)?;
    // A key of no length means that the name is not known.
    context.set_psk_server_callback(move |_, name, out| {
        let Some(key) = name.and_then(|name| keys.get(name)) else {
            tracing::warn!("a TLS client has a name that is not in the file of keys");
            return Ok(0);
        };
        let Some(to) = out.get_mut(..key.len()) else { return Ok(0) };
        to.copy_from_slice(key);
        Ok(key.len())
    });
    Ok(())
}

/// Names and keys of a file.
fn read_keys(path: &Path) -> Result<HashMap<Vec<u8>, Vec<u8>>, TlsError> {
    let unreadable = |error| TlsError::Read { path: path.to_owned(), error };
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > PSK_FILE_BYTES_MAX {
        return Err(unreadable(std::io::ErrorKind::FileTooLarge.into()));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let mut keys = HashMap::new();
    for (n, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |what| TlsError::Key { path: path.to_owned(), line: n + 1, what };
        // A name may hold a colon, a key does not.
        let (name, key) = line.trim_end().rsplit_once(':').ok_or_else(|| wrong("not `user:key`"))?;
        let key = unhex(key).ok_or_else(|| wrong("the key is not hexadecimal"))?;
        if !(PSK_KEY_BYTES_MIN..=PSK_KEY_BYTES_MAX).contains(&key.len()) {
            return Err(wrong("the key is not 16 to 256 bytes long"));
        }
        if name.is_empty() || keys.insert(name.as_bytes().to_vec(), key).is_some() {
            return Err(wrong("the name is empty, or there twice"));
        }
    }
    if keys.is_empty() {
        return Err(TlsError::Key { path: path.to_owned(), line: 1, what: "there is no key" });
    }
    Ok(keys)
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) || !digits.len().is_multiple_of(2) {
        return None;
    }
    let pairs = digits.as_bytes().chunks_exact(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Result<HashMap<Vec<u8>, Vec<u8>>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.psk");
        std::fs::write(&path, text).unwrap();
        read_keys(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_are_read_as_the_usual_tools_write_them() {
        let long = "ab".repeat(32);
        let found = keys(&format!("alice:{long}\n\nb:ob:000102030405060708090a0b0c0d0e0F\n")).unwrap();
        assert_eq!(found[b"alice".as_slice()], [0xab; 32]);
        assert_eq!(found[b"b:ob".as_slice()], (0..16).collect::<Vec<u8>>());
        for (text, word) in [
            ("alice\n", "line 1: not"),
            ("alice:xy\n", "hexadecimal"),
            ("alice:+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1\n", "hexadecimal"),
            ("alice:00\n", "16 to 256"),
            ("\n\n", "no key"),
            (&format!("a:{long}\na:{long}\n"), "line 2: the name"),
        ] {
            let error = keys(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn settings_that_protect_nothing_are_refused() {
        let some = Some(PathBuf::from("/nowhere"));
        for settings in [
            Settings { verify_peer: true, ..Settings::default() },
            Settings { psk: some.clone(), certificates: some.clone(), verify_peer: false },
        ] {
            assert!(matches!(Tls::load(&settings), Err(TlsError::Settings(_))));
        }
        let missing = Tls::load(&Settings { psk: some.clone(), ..Settings::default() });
        assert!(matches!(missing, Err(TlsError::Read { .. })));
        let missing = Tls::load(&Settings { certificates: some, ..Settings::default() });
        assert!(matches!(missing, Err(TlsError::Read { .. })));
        assert!(Tls::load(&Settings::default()).unwrap().is_none());
    }
}
