//! `coppice sr …`.

use std::time::Duration;

use serde_json::{Value, json};

use super::Context;
use crate::cli::{Place, SrCommand};
use crate::client::escaped;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::render;
use crate::resolve;
use crate::view::{self, Forest, Sr};

/// Between two drawings of a watched tree.
const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// Does what was asked.
pub fn run(context: &Context, command: SrCommand) -> Outcome<()> {
    let smd = &context.smd;
    match command {
        SrCommand::Create { name, place, thin, uuid } => {
            let mut body = placed(&place)?;
            (body["name"], body["uuid"], body["thin"]) = (json!(name), json!(uuid), json!(thin));
            show(context, &smd.post("/srs", &body)?);
        }
        SrCommand::Introduce { name, place, uuid } => {
            let mut body = placed(&place)?;
            (body["name"], body["uuid"], body["introduce"]) = (json!(name), json!(uuid), json!(true));
            show(context, &smd.post("/srs", &body)?);
        }
        SrCommand::Probe(place) => {
            let answer = smd.post("/srs/probe", &placed(&place)?)?;
            context.output.result(&answer, || render::report::probe(&answer));
        }
        SrCommand::Check { sr, strict } => check(context, &sr, strict)?,
        SrCommand::List => {
            let answer = view::inner(smd.get("/srs")?, "srs");
            let list: Vec<Sr> = view::read(&answer)?;
            context.output.result(&answer, || render::srs(&list));
        }
        SrCommand::Show(arg) => {
            let sr = resolve::sr(smd, &arg.sr)?;
            show(context, &smd.get(&format!("/srs/{sr}"))?);
        }
        SrCommand::Tree { sr, watch: false } => {
            let answer = tree(context, &sr)?;
            let forest: Forest = view::read(&answer)?;
            context.output.result(&answer, || render::tree::forest(&forest));
        }
        SrCommand::Tree { sr, watch: true } => watch(context, &sr)?,
        SrCommand::Scan(arg) => verb(context, &arg.sr, "scan")?,
        SrCommand::Attach(arg) => verb(context, &arg.sr, "attach")?,
        SrCommand::Detach(arg) => verb(context, &arg.sr, "detach")?,
        SrCommand::Forget(arg) => verb(context, &arg.sr, "forget")?,
        SrCommand::Destroy(arg) => verb(context, &arg.sr, "destroy")?,
    }
    Ok(())
}

/// The body of a request about a place.
fn placed(place: &Place) -> Outcome<Value> {
    let devices: Vec<_> = place.devices.iter().map(|device| absolute(device)).collect::<Outcome<_>>()?;
    let path = place.path.as_deref().map(absolute).transpose()?;
    Ok(json!({"type": place.kind.word(), "path": path, "devices": devices}))
}

fn check(context: &Context, sr: &str, strict: bool) -> Outcome<()> {
    let sr = resolve::sr(&context.smd, sr)?;
    let answer = context.smd.get_slow(&format!("/srs/{sr}/check"))?;
    let sound = answer["sound"] == true;
    if strict && !sound {
        let broken = answer["broken"].as_array().map_or(0, Vec::len);
        let mut failure = Failure::new("BAD_IMAGE", format!("{broken} images of SR {sr} are broken"));
        if !context.output.json {
            output::print(&render::report::check(&answer));
        }
        failure.more.insert("report".to_owned(), answer);
        return Err(failure);
    }
    context.output.result(&answer, || render::report::check(&answer));
    Ok(())
}

/// Draws until somebody stops us, or the storage repository cannot be read.
fn watch(context: &Context, sr: &str) -> Outcome<()> {
    loop {
        let answer = tree(context, sr)?;
        let forest: Forest = view::read(&answer)?;
        context.output.frame(&answer, || render::tree::forest(&forest));
        std::thread::sleep(WATCH_PAUSE);
    }
}

/// The trees of one storage repository, with what the collector does in them
/// when it runs.
fn tree(context: &Context, sr: &str) -> Outcome<Value> {
    let sr = resolve::sr(&context.smd, sr)?;
    let mut tree = context.smd.get(&format!("/srs/{sr}/tree"))?;
    if let Ok(status) = context.gcd.get(&format!("/status?sr={}", escaped(&sr))) {
        let nodes = status.pointer("/srs/0/nodes").unwrap_or(&Value::Null);
        if let Some(Value::Array(roots)) = tree.get_mut("roots") {
            roots.iter_mut().for_each(|root| annotate(root, nodes));
        }
    }
    Ok(tree)
}

/// Adds `gc` to every node that the collector has something to say about.
fn annotate(node: &mut Value, states: &Value) {
    let state = node.get("uuid").and_then(Value::as_str).and_then(|uuid| states.get(uuid)).cloned();
    if let (Some(state), Value::Object(map)) = (state, &mut *node) {
        map.insert("gc".to_owned(), state);
    }
    if let Some(Value::Array(children)) = node.get_mut("children") {
        children.iter_mut().for_each(|child| annotate(child, states));
    }
}

fn verb(context: &Context, sr: &str, verb: &str) -> Outcome<()> {
    let sr = resolve::sr(&context.smd, sr)?;
    show(context, &context.smd.post(&format!("/srs/{sr}/{verb}"), &json!({}))?);
    Ok(())
}

fn show(context: &Context, answer: &Value) {
    context.output.result(answer, || render::object(answer));
}

/// The daemon has another working folder than the one who types.
fn absolute(path: &std::path::Path) -> Outcome<std::path::PathBuf> {
    std::path::absolute(path).map_err(|e| Failure::new("IO_ERROR", format!("{}: {e}", path.display())))
}
