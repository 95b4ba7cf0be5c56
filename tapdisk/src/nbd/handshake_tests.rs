use super::*;

fn export() -> Export {
    Export {
        name: "disk".into(),
        description: "a disk".into(),
        virtual_bytes: 1 << 30,
        read_only: false,
        fast_zero: true,
    }
}

/// Kinds and data of the replies in `out`.
fn replies(mut out: &[u8]) -> Vec<(u32, Vec<u8>)> {
    use zerocopy::FromBytes;
    let mut all = Vec::new();
    while !out.is_empty() {
        let (header, rest) = OptionReply::read_from_prefix(out).unwrap();
        let (data, rest) = rest.split_at(header.len.get() as usize);
        all.push((header.kind.get(), data.to_vec()));
        out = rest;
    }
    all
}

fn ask(handshake: &mut Handshake, option: u32, data: &[u8]) -> (Next, Vec<(u32, Vec<u8>)>) {
    let mut out = Vec::new();
    let next = handshake.option((&export(), Security::Plain), option, data, &mut out);
    (next, replies(&out))
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(rest);
    data
}

fn queries(queries: &[&str]) -> Vec<u8> {
    let mut data = (queries.len() as u32).to_be_bytes().to_vec();
    for query in queries {
        data.extend(named(query, &[]));
    }
    named("disk", &data)
}

#[test]
fn go_ends_the_handshake_only_for_our_names() {
    let mut handshake = Handshake::default();
    let (next, said) = ask(&mut handshake, option::GO, &named("other", &[0, 0]));
    assert_eq!((next, said[0].0), (Next::Option, option_reply::ERR_UNKNOWN));
    for name in ["", "disk"] {
        let (next, said) = ask(&mut handshake, option::GO, &named(name, &[0, 1, 0, 1]));
        let kinds: Vec<_> = said.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(next, Next::Transmission);
        assert_eq!(kinds, [3, 3, 3, 1]);
        assert_eq!(said[2].1, b"\0\x01disk");
    }
}

#[test]
fn malformed_options_are_refused_and_the_handshake_goes_on() {
    let mut handshake = Handshake::default();
    for (option, data) in [
        (option::GO, vec![]),
        (option::GO, vec![0, 0, 0, 9, b'x']),
        (option::GO, named("disk", &[0, 2, 0, 1])),
        (option::INFO, named("disk", &[0, 0, 0])),
        (option::LIST, vec![1]),
        (option::STRUCTURED_REPLY, vec![1]),
        (option::EXTENDED_HEADERS, vec![1]),
        (option::SET_META_CONTEXT, named("disk", &[0, 0, 0, 1])),
        (option::LIST_META_CONTEXT, named("disk", &u32::MAX.to_be_bytes())),
    ] {
        let (next, said) = ask(&mut handshake, option, &data);
        assert_eq!((next, said.len()), (Next::Option, 1), "{option}");
        assert_eq!(said[0].0, option_reply::ERR_INVALID, "{option}");
    }
    for unknown in [0, 4, 12, u32::MAX] {
        let (_, said) = ask(&mut handshake, unknown, b"anything");
        assert_eq!(said[0].0, option_reply::ERR_UNSUP);
    }
}

#[test]
fn contexts_are_chosen_by_exact_name_after_structured_replies() {
    let mut handshake = Handshake::default();
    let both = queries(&["base:allocation", "qemu:allocation-depth", "x:y"]);
    let (_, said) = ask(&mut handshake, option::SET_META_CONTEXT, &both);
    assert_eq!(said[0].0, option_reply::ERR_INVALID);
    ask(&mut handshake, option::STRUCTURED_REPLY, &[]);
    let (_, said) = ask(&mut handshake, option::SET_META_CONTEXT, &both);
    assert_eq!(said[0], (option_reply::META_CONTEXT, b"\0\0\0\x01base:allocation".to_vec()));
    assert_eq!(said.len(), 3);
    assert!(handshake.agreed.allocation && handshake.agreed.depth);
    // Choosing again replaces the choice; a wildcard chooses nothing.
    let (_, said) = ask(&mut handshake, option::SET_META_CONTEXT, &queries(&["base:"]));
    assert_eq!(said.len(), 1);
    assert!(!handshake.agreed.allocation && !handshake.agreed.depth);
}

#[test]
fn extended_headers_include_structured_replies() {
    let mut handshake = Handshake::default();
    assert_eq!(ask(&mut handshake, option::STRUCTURED_REPLY, &[]).1[0].0, option_reply::ACK);
    assert_eq!(ask(&mut handshake, option::EXTENDED_HEADERS, &[]).1[0].0, option_reply::ACK);
    let (_, said) = ask(&mut handshake, option::STRUCTURED_REPLY, &[]);
    assert_eq!(said[0].0, option_reply::ERR_EXT_HEADER_REQD);
    assert_eq!(handshake.agreed.mode, Mode::Extended);
    ask(&mut handshake, option::SET_META_CONTEXT, &queries(&["base:allocation"]));
    assert!(handshake.agreed.allocation);
}

#[test]
fn contexts_are_listed_by_name_and_namespace() {
    let mut handshake = Handshake::default();
    for (asked, found) in
        [(vec![], 2), (vec!["base:"], 1), (vec!["qemu:", "base:allocation"], 2), (vec!["base"], 0)]
    {
        let (_, said) = ask(&mut handshake, option::LIST_META_CONTEXT, &queries(&asked));
        assert_eq!(said.len(), found + 1, "{asked:?}");
    }
}

#[test]
fn export_name_says_size_and_flags_and_zeros_unless_told() {
    let mut handshake = Handshake::default();
    let mut out = Vec::new();
    let next = handshake.option((&export(), Security::Plain), option::EXPORT_NAME, b"disk", &mut out);
    assert_eq!((next, out.len()), (Next::Transmission, 134));
    handshake.no_zeroes = true;
    out.clear();
    handshake.option((&export(), Security::Plain), option::EXPORT_NAME, b"", &mut out);
    assert_eq!(out.len(), 10);
    out.clear();
    let next = handshake.option((&export(), Security::Plain), option::EXPORT_NAME, b"no", &mut out);
    assert_eq!((next, out.len()), (Next::Close, 0));
}

#[test]
fn tls_comes_first_where_it_is_required_and_only_once() {
    let ask = |security, option, data: &[u8]| {
        let mut out = Vec::new();
        let next = Handshake::default().option((&export(), security), option, data, &mut out);
        (next, replies(&out).first().map(|(kind, _)| *kind))
    };
    use Security::{Offered, Plain, Required, Secured};
    let refused = |kind| (Next::Option, Some(kind));
    for option in [option::GO, option::LIST, option::STRUCTURED_REPLY, 77] {
        assert_eq!(ask(Required, option, &[]), refused(option_reply::ERR_TLS_REQD));
    }
    assert_eq!(ask(Required, option::EXPORT_NAME, b"disk"), (Next::Close, None));
    assert_eq!(ask(Required, option::ABORT, &[]).0, Next::Goodbye);
    for security in [Required, Offered] {
        let begun = (Next::StartTls, Some(option_reply::ACK));
        assert_eq!(ask(security, option::STARTTLS, &[]), begun);
        assert_eq!(ask(security, option::STARTTLS, &[1]), refused(option_reply::ERR_INVALID));
    }
    assert_eq!(ask(Plain, option::STARTTLS, &[]), refused(option_reply::ERR_UNSUP));
    assert_eq!(ask(Secured, option::STARTTLS, &[]), refused(option_reply::ERR_INVALID));
    assert_eq!(ask(Secured, option::GO, &named("disk", &[0, 0])).0, Next::Transmission);
}

#[test]
fn an_observer_sees_the_same_disk_for_reading_only() {
    for name in ["disk@observe", "@observe"] {
        let mut handshake = Handshake::default();
        let mut out = Vec::new();
        let disk = (&export(), Security::Plain);
        let next = handshake.option(disk, option::EXPORT_NAME, name.as_bytes(), &mut out);
        let chosen = handshake.chosen.unwrap();
        assert_eq!((next, chosen.virtual_bytes), (Next::Transmission, export().virtual_bytes));
        assert!(chosen.read_only && chosen.is_observed() && !export().is_observed());
        let flags = u16::from_be_bytes([out[8], out[9]]);
        assert_ne!(flags & proto::transmission_flag::READ_ONLY, 0);
    }
    let mut out = Vec::new();
    let disk = (&export(), Security::Plain);
    let next = Handshake::default().option(disk, option::EXPORT_NAME, b"no@observe", &mut out);
    assert_eq!(next, Next::Close);
}

#[test]
fn a_read_only_export_offers_no_writes() {
    let read_only = Export { read_only: true, ..export() };
    let flags = read_only.flags(Agreed::default());
    assert_ne!(flags & proto::transmission_flag::READ_ONLY, 0);
    assert_eq!(flags & proto::transmission_flag::SEND_TRIM, 0);
}
