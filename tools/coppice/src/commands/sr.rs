//! `coppice sr …`.

use serde_json::{Value, json};

use super::Context;
use crate::cli::SrCommand;
use crate::client::escaped;
use crate::failure::{Failure, Outcome};
use crate::render;
use crate::resolve;
use crate::view::{self, Forest, Sr};

/// Does what was asked.
pub fn run(context: &Context, command: SrCommand) -> Outcome<()> {
    let smd = &context.smd;
    match command {
        SrCommand::Create { name, kind, path, uuid } => {
            let path = absolute(&path)?;
            let body = json!({"name": name, "type": kind.word(), "path": path, "uuid": uuid});
            show(context, &smd.post("/srs", &body)?);
        }
        SrCommand::Introduce { name, kind, path, uuid } => {
            let path = absolute(&path)?;
            let body = json!({
                "name": name, "type": kind.word(), "path": path, "uuid": uuid, "introduce": true,
            });
            show(context, &smd.post("/srs", &body)?);
        }
        SrCommand::List => {
            let answer = view::inner(smd.get("/srs")?, "srs");
            let list: Vec<Sr> = view::read(&answer)?;
            context.output.result(&answer, || render::srs(&list));
        }
        SrCommand::Show(arg) => {
            let sr = resolve::sr(smd, &arg.sr)?;
            show(context, &smd.get(&format!("/srs/{sr}"))?);
        }
        SrCommand::Tree(arg) => {
            let answer = tree(context, &arg.sr)?;
            let forest: Forest = view::read(&answer)?;
            context.output.result(&answer, || render::tree::forest(&forest));
        }
        SrCommand::Scan(arg) => verb(context, &arg.sr, "scan")?,
        SrCommand::Attach(arg) => verb(context, &arg.sr, "attach")?,
        SrCommand::Detach(arg) => verb(context, &arg.sr, "detach")?,
        SrCommand::Forget(arg) => verb(context, &arg.sr, "forget")?,
        SrCommand::Destroy(arg) => verb(context, &arg.sr, "destroy")?,
    }
    Ok(())
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
