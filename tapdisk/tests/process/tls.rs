//! Clients over TCP and TLS: those with the right papers get in, all others
//! are turned away, and none disturbs the rest.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{SslConnector, SslMethod};
use openssl::x509::extension::{BasicConstraints, KeyUsage, SubjectAlternativeName};
use openssl::x509::{X509, X509NameBuilder};

use super::support::*;

/// A name with its key and a certificate.
struct Papers {
    key: PKey<Private>,
    certificate: X509,
}

impl Papers {
    /// For `name`, signed by `authority`, or an authority itself.
    fn new(name: &str, authority: Option<&Self>) -> Self {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
        let mut subject = X509NameBuilder::new().unwrap();
        subject.append_entry_by_text("CN", name).unwrap();
        let subject = subject.build();
        let mut builder = X509::builder().unwrap();
        builder.set_version(2).unwrap();
        let serial = BigNum::from_u32(name.len() as u32 + 1).unwrap().to_asn1_integer().unwrap();
        builder.set_serial_number(&serial).unwrap();
        builder.set_subject_name(&subject).unwrap();
        builder.set_issuer_name(authority.map_or(&subject, |by| by.certificate.subject_name())).unwrap();
        builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
        builder.set_not_after(&Asn1Time::days_from_now(30).unwrap()).unwrap();
        builder.set_pubkey(&key).unwrap();
        if authority.is_none() {
            let constraints = BasicConstraints::new().critical().ca().build().unwrap();
            builder.append_extension(constraints).unwrap();
            let usage = KeyUsage::new().critical().key_cert_sign().build().unwrap();
            builder.append_extension(usage).unwrap();
        } else {
            let context = builder.x509v3_context(None, None);
            let names =
                SubjectAlternativeName::new().ip("127.0.0.1").dns("localhost").build(&context).unwrap();
            builder.append_extension(names).unwrap();
        }
        builder.sign(authority.map_or(&key, |by| &by.key), MessageDigest::sha256()).unwrap();
        Self { key, certificate: builder.build() }
    }

    fn write(&self, folder: &Path, role: &str) {
        let file = |what: &str| folder.join(format!("{role}-{what}.pem"));
        std::fs::write(file("cert"), self.certificate.to_pem().unwrap()).unwrap();
        std::fs::write(file("key"), self.key.private_key_to_pem_pkcs8().unwrap()).unwrap();
    }
}

/// A folder for the server and one for clients, of one authority.
fn folders(place: &Place) {
    let authority = Papers::new("authority", None);
    let stranger = Papers::new("another", None);
    for (folder, by) in [("server", &authority), ("client", &authority), ("stranger", &stranger)] {
        let folder = place.path(folder);
        std::fs::create_dir(&folder).unwrap();
        authority.write(&folder, "ca");
        Papers::new("host", Some(by)).write(&folder, "server");
        Papers::new("alice", Some(by)).write(&folder, "client");
    }
    let key = "5a".repeat(32);
    std::fs::write(place.path("keys.psk"), format!("bob:{}\nalice:{key}\n", "00".repeat(16))).unwrap();
    std::fs::create_dir(place.path("psk")).unwrap();
    std::fs::write(place.path("psk/keys.psk"), format!("alice:{key}\n")).unwrap();
    std::fs::write(place.path("wrong.psk"), format!("alice:{}\n", "5b".repeat(32))).unwrap();
    std::fs::write(place.path("nobody.psk"), format!("carol:{key}\n")).unwrap();
}

/// A tapdisk that listens on some port of this host.
fn listening(place: &Place, more: &[&str]) -> (Tapdisk, SocketAddr) {
    let (tapdisk, said) = place.start(&[&["--listen", "127.0.0.1:0", "--export", "disk"], more].concat());
    assert_eq!(said["ready"], true, "{said}");
    (tapdisk, said["listen"].as_str().unwrap().parse().unwrap())
}

/// A tapdisk that lets in who has one of the keys.
fn with_keys() -> (Place, Tapdisk, SocketAddr) {
    let place = Place::new();
    folders(&place);
    let keys = place.path("keys.psk");
    let (tapdisk, address) = listening(&place, &["--tls-psk", keys.to_str().unwrap()]);
    (place, tapdisk, address)
}

/// qemu gets in with these credentials.
fn qemu_sees_it(credentials: &str, image: &str) {
    if let Some(said) = client("qemu-img", &["info", "--object", credentials, "--image-opts", image]) {
        assert!(said.contains("64 MiB"), "{said}");
    }
}

/// The whole disk through `uri`, there and back.
fn copies(place: &Place, uri: &str) {
    let source: Vec<u8> = (0..DISK_BYTES / 8).flat_map(|n| (n * n).to_le_bytes()).collect();
    std::fs::write(place.path("source"), &source).unwrap();
    let (from, to) = (place.path("source"), place.path("copy"));
    client("nbdcopy", &["--connections=4", from.to_str().unwrap(), uri]);
    if client("nbdcopy", &["--connections=4", uri, to.to_str().unwrap()]).is_some() {
        assert!(std::fs::read(&to).unwrap() == source);
    }
}

#[test]
fn clients_with_certificates_get_in_and_others_do_not() {
    let place = Place::new();
    folders(&place);
    let certificates = place.path("server");
    let (_tapdisk, address) =
        listening(&place, &["--tls-certificates", certificates.to_str().unwrap(), "--tls-verify-peer"]);
    let uri =
        |folder: &str| format!("nbds://{address}/disk?tls-certificates={}", place.path(folder).display());
    if let Some(said) = client("nbdinfo", &[&uri("client")]) {
        assert!(said.contains("protocol: newstyle-fixed with TLS"), "{said}");
        assert!(said.contains("export-size: 67108864"), "{said}");
    }
    copies(&place, &uri("client"));
    // Whoever is turned away reads the alert, which says why.
    for (uri, word) in
        [(format!("nbd://{address}/disk"), "TLS"), (uri("stranger"), "alert"), (uri("psk"), "alert")]
    {
        let Some((fine, said)) = try_client("nbdinfo", &[&uri]) else { return };
        assert!(!fine && said.contains(word), "{uri}: {said}");
    }
    let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", place.path("client").display());
    let image = format!(
        "driver=nbd,host=127.0.0.1,port={},export=disk,tls-creds=tls,tls-hostname=localhost",
        address.port()
    );
    qemu_sees_it(&credentials, &image);
}

#[test]
fn clients_with_a_shared_key_get_in_and_others_do_not() {
    let (place, _tapdisk, address) = with_keys();
    let uri = |user: &str, file: &str| {
        format!("nbds://{user}@{address}/disk?tls-psk-file={}", place.path(file).display())
    };
    if let Some(said) = client("nbdinfo", &[&uri("alice", "keys.psk")]) {
        assert!(said.contains("with TLS"), "{said}");
    }
    client("nbdinfo", &["--map", &uri("bob", "keys.psk")]);
    copies(&place, &uri("alice", "psk/keys.psk"));
    for uri in [uri("alice", "wrong.psk"), uri("carol", "nobody.psk"), format!("nbd://{address}/disk")] {
        let Some((fine, said)) = try_client("nbdinfo", &[&uri]) else { return };
        assert!(!fine, "{uri}: {said}");
    }
    let credentials =
        format!("tls-creds-psk,id=tls,endpoint=client,username=alice,dir={}", place.path("psk").display());
    let image = format!("driver=nbd,host=127.0.0.1,port={},export=disk,tls-creds=tls", address.port());
    qemu_sees_it(&credentials, &image);
}

#[test]
fn clients_of_this_host_may_use_tls_and_need_not() {
    let (place, _tapdisk, _) = with_keys();
    let keys = place.path("keys.psk");
    let socket = place.path("run/nbd.sock");
    let secured =
        format!("nbds+unix://alice@/disk?socket={}&tls-psk-file={}", socket.display(), keys.display());
    if let Some(said) = client("nbdinfo", &[&secured]) {
        assert!(said.contains("with TLS"), "{said}");
    }
    if let Some(said) = client("nbdinfo", &[&format!("nbd+unix:///disk?socket={}", socket.display())]) {
        assert!(said.contains("without TLS"), "{said}");
    }
}

#[test]
fn without_tls_only_this_host_is_listened_to_unless_told() {
    let place = Place::new();
    let (mut tapdisk, said) = place.start(&["--listen", "0.0.0.0:0"]);
    assert_eq!((said["ready"].as_bool(), tapdisk.wait().code()), (Some(false), Some(1)));
    assert!(said["error"].as_str().unwrap().contains("--insecure"), "{said}");
    let (tapdisk, said) = place.start(&["--listen", "0.0.0.0:0", "--insecure"]);
    assert_eq!(said["ready"], true, "{said}");
    drop(tapdisk);
    let (_tapdisk, address) = listening(&place, &[]);
    if let Some(said) = client("nbdinfo", &[&format!("nbd://{address}/disk")]) {
        assert!(said.contains("without TLS"), "{said}");
    }
}

/// Past the greeting, with the option TLS begins with.
fn starttls(address: SocketAddr) -> TcpStream {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0").unwrap();
    let mut said = [0; 18 + 20];
    socket.read_exact(&mut said).unwrap();
    assert_eq!(said[18 + 12..18 + 16], [0, 0, 0, 1], "no TLS");
    socket
}

#[test]
fn a_flood_over_tls_that_nobody_reads_the_answers_of_costs_no_time() {
    let place = Place::new();
    folders(&place);
    let keys = place.path("keys.psk");
    let (tapdisk, address) = listening(&place, &["--tls-psk", keys.to_str().unwrap()]);
    let mut connector = SslConnector::builder(SslMethod::tls_client()).unwrap();
    connector.set_ciphersuites("TLS_AES_128_GCM_SHA256").unwrap();
    connector.set_psk_client_callback(|_, _, name, key| {
        name[..6].copy_from_slice(b"alice\0");
        key[..32].fill(0x5a);
        Ok(32)
    });
    let config = connector.build().configure().unwrap().verify_hostname(false);
    let mut deaf = config.connect("tapdisk", starttls(address)).unwrap();
    deaf.write_all(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0").unwrap();
    let mut said = [0; 20 + 12 + 20 + 14 + 20];
    deaf.read_exact(&mut said).unwrap();
    deaf.get_ref().set_nonblocking(true).unwrap();
    let mut flood = 0x2560_9513u32.to_be_bytes().to_vec();
    flood.extend([0; 20]);
    flood.extend((1u32 << 20).to_be_bytes());
    while deaf.write_all(&flood.repeat(500)).is_ok() {}
    // It holds all it may hold, and more waits in the socket.
    let mut local = place.nbd();
    assert_eq!(write(&mut local, 4096, &[1; 512]), 0);
    let before = ticks(&tapdisk);
    std::thread::sleep(Duration::from_secs(2));
    let used = ticks(&tapdisk) - before;
    assert!(used <= 5, "{used} ticks in two seconds of silence");
    assert_eq!(read(&mut local, 4096, 512), [1; 512]);
}

#[test]
fn peers_that_stall_or_babble_in_tls_disturb_nobody() {
    let (place, _tapdisk, address) = with_keys();
    // A client of this host, before, while and after.
    let mut local = place.nbd();
    let uri = format!("nbds://alice@{address}/disk?tls-psk-file={}", place.path("keys.psk").display());
    let mut silent = Vec::new();
    let mut rng = 1u32;
    for n in 0..100u8 {
        let mut socket = starttls(address);
        let garbage: Vec<u8> = (0..usize::from(n) * 7)
            .map(|_| {
                rng = rng.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (rng >> 24) as u8
            })
            .collect();
        // Some look like a handshake record that never comes whole.
        let record = if n % 2 == 0 { b"\x16\x03\x01\x40\x00\x01".as_slice() } else { &[] };
        let _ = socket.write_all(&[record, &garbage].concat());
        silent.push(socket);
        if n % 10 == 0 {
            assert_eq!(write(&mut local, 4096, &[n; 512]), 0);
            assert_eq!(read(&mut local, 4096, 512), [n; 512]);
            client("nbdinfo", &["--size", &uri]);
        }
    }
    // Words before TLS began do not count as said under it.
    let mut eager = TcpStream::connect(address).unwrap();
    eager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let option = b"IHAVEOPT\0\0\0\x05\0\0\0\0";
    eager.write_all(&[b"\0\0\0\x03".as_slice(), option, option].concat()).unwrap();
    let mut said = Vec::new();
    let _ = eager.read_to_end(&mut said); // ends, by reset or by end
    assert!(said.len() <= 18 + 20);
    client("nbdinfo", &["--size", &uri]);
}

#[test]
fn a_client_that_babbles_on_reads_why_it_is_turned_away() {
    let (_place, _tapdisk, address) = with_keys();
    for _ in 0..20 {
        let mut socket = starttls(address);
        // A record that begins no handshake, and more than is ever looked at.
        socket.write_all(b"\x16\x03\x01\x00\x05").unwrap();
        socket.write_all(&[0x55; 64 << 10]).unwrap();
        let mut said = Vec::new();
        socket.read_to_end(&mut said).unwrap(); // by an end, not by a reset
        assert_eq!(said.first(), Some(&21), "an alert: {said:?}");
    }
}

#[test]
fn certificates_that_are_renewed_count_for_new_connections() {
    let place = Place::new();
    folders(&place);
    let certificates = place.path("server");
    let (_tapdisk, address) =
        listening(&place, &["--tls-certificates", certificates.to_str().unwrap(), "--tls-verify-peer"]);
    let uri =
        |folder: &str| format!("nbds://{address}/disk?tls-certificates={}", place.path(folder).display());
    if client("nbdinfo", &["--size", &uri("client")]).is_none() {
        return;
    }
    // Another authority from here on; the key comes last, as it may.
    let authority = Papers::new("another authority", None);
    let host = Papers::new("host", Some(&authority));
    std::fs::create_dir(place.path("renewed")).unwrap();
    authority.write(&place.path("renewed"), "ca");
    Papers::new("alice", Some(&authority)).write(&place.path("renewed"), "client");
    authority.write(&certificates, "ca");
    std::fs::write(certificates.join("server-cert.pem"), host.certificate.to_pem().unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    client("nbdinfo", &["--size", &uri("client")]); // what does not fit together changes nothing
    host.write(&certificates, "server");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !try_client("nbdinfo", &["--size", &uri("renewed")]).unwrap().0 {
        assert!(Instant::now() < deadline, "the new authority's client is not let in");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!try_client("nbdinfo", &[&uri("client")]).unwrap().0, "the former authority's still is");
}
