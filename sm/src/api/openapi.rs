//! `GET /openapi.json`: the routes as data; of smd here, and of other daemons
//! of ours by [`describe`].

use serde_json::{Map, Value, json};

/// Method, path, what it does, fields of its body (`?`: may be left out).
pub type Route = (&'static str, &'static str, &'static str, &'static [&'static str]);

const ROUTES: &[Route] = &[
    ("get", "/srs", "All SRs; with ?name= what is known of those without looking", &[]),
    (
        "post",
        "/srs",
        "Create or introduce an SR",
        &["name", "type", "path?", "devices?", "thin?", "uuid?", "introduce?"],
    ),
    ("get", "/srs/{sr}", "One SR", &[]),
    ("post", "/srs/probe", "What lies at a path; changes nothing", &["type", "path?", "devices?"]),
    ("get", "/srs/{sr}/check", "Read all metadata; changes nothing", &[]),
    ("get", "/srs/{sr}/tree", "All trees of an SR", &[]),
    ("get", "/srs/{sr}/history", "What was done, newest first", &[]),
    ("post", "/srs/{sr}/scan", "Recover, label new images, nudge the collector", &[]),
    ("post", "/srs/{sr}/attach", "Use an SR on this host", &[]),
    ("post", "/srs/{sr}/detach", "Stop using an SR", &[]),
    ("post", "/srs/{sr}/forget", "Forget a detached SR", &[]),
    ("post", "/srs/{sr}/destroy", "Destroy an SR without VDIs", &[]),
    (
        "get",
        "/vdis",
        "All VDIs of attached SRs, or of ?sr=, or of ?name=; hidden nodes with ?hidden=true",
        &[],
    ),
    ("post", "/vdis", "Create a VDI", &["sr", "name", "virtual_size"]),
    (
        "post",
        "/vdis/snapshot",
        "Snapshot VDIs at one instant; with `hold` a job that waits at stage `ready` until told to proceed",
        &["vdis", "name?", "hold?"],
    ),
    ("get", "/vdis/{vdi}", "One VDI or hidden node", &[]),
    ("delete", "/vdis/{vdi}", "Delete a VDI", &[]),
    ("get", "/vdis/{vdi}/stat", "What it takes and what deleting it frees", &[]),
    ("post", "/vdis/{vdi}/clone", "A writable clone", &["name?"]),
    ("post", "/vdis/{vdi}/rename", "New words", &["name?", "description?"]),
    (
        "post",
        "/vdis/{vdi}/attach",
        "Serve it over NBD: on this host, and with `listen` (address:port) on TCP too",
        &["read_only?", "listen?", "tls_certificates?", "tls_verify_peer?", "tls_psk?", "insecure?"],
    ),
    ("post", "/vdis/{vdi}/detach", "Stop serving it", &["force?"]),
    ("post", "/vdis/{vdi}/resize", "Another size, in bytes; larger while attached too", &["virtual_size"]),
    ("post", "/vdis/{vdi}/revert", "Back to what a snapshot of it holds; not while attached", &["to"]),
    ("post", "/vdis/{vdi}/copy", "A job: a flattened copy in any attached SR", &["sr", "name?"]),
    (
        "get",
        "/vdis/{vdi}/map",
        "Which node has which bytes, and where: ?offset=&length=; go on from `next`",
        &[],
    ),
    (
        "get",
        "/vdis/{vdi}/changed",
        "Ranges that can differ from ?since= (a VDI or node); go on with ?offset= from `next`",
        &[],
    ),
    (
        "get",
        "/vdis/{vdi}/export",
        "Its content as a stream: ?format=vhd (as a delta over ?base=), raw, or extents (raw without holes); ?job= names its job",
        &[],
    ),
    (
        "post",
        "/srs/{sr}/import",
        "A new VDI called ?name= from the body: ?format=, ?base= for a delta, ?job=",
        &[],
    ),
    ("get", "/jobs", "Long operations, newest first: state queued, running, done, failed or cancelled", &[]),
    ("get", "/jobs/{job}", "One of them; with ?wait_ms= as soon as it has ended or the time is up", &[]),
    ("post", "/jobs/{job}/proceed", "Tell a job that holds to go on", &[]),
    ("post", "/jobs/{job}/cancel", "Stop it, leaving nothing behind", &[]),
    ("get", "/status", "This daemon, and disks whose tapdisk died or is in trouble", &[]),
    ("get", "/openapi.json", "This document", &[]),
    ("get", "/metrics", "Prometheus text", &[]),
];

/// The document of smd.
#[must_use]
pub fn document() -> Value {
    describe("smd", "Storage repositories and virtual disks of one host", ROUTES)
}

/// The document of a daemon.
#[must_use]
pub fn describe(title: &str, description: &str, routes: &[Route]) -> Value {
    let mut paths = Map::new();
    for route in routes {
        let (method, path, ..) = *route;
        let methods = paths.entry(path).or_insert_with(|| json!({}));
        methods[method] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": env!("CARGO_PKG_VERSION"),
            "description": description,
        },
        "paths": paths,
        "components": { "schemas": { "Error": error_schema() } },
    })
}

fn operation((_, path, summary, fields): &Route) -> Value {
    let failed = json!({
        "description": "Refused or failed",
        "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Error" } } },
    });
    let mut operation = json!({
        "summary": summary,
        "responses": { "200": { "description": "Done" }, "default": failed },
    });
    let parameters: Vec<Value> = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| {
            json!({
                "name": name, "in": "path", "required": true,
                "description": "uuid, or a name that is unique", "schema": { "type": "string" },
            })
        })
        .collect();
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if !fields.is_empty() {
        let required: Vec<&str> = fields.iter().filter(|f| !f.ends_with('?')).copied().collect();
        let properties: Map<String, Value> =
            fields.iter().map(|f| (f.trim_end_matches('?').to_owned(), json!({}))).collect();
        let schema = json!({ "type": "object", "required": required, "properties": properties });
        operation["requestBody"] = json!({ "content": { "application/json": { "schema": schema } } });
    }
    operation
}

fn error_schema() -> Value {
    let text = json!({ "type": "string" });
    let fields = json!({
        "type": "object",
        "required": ["code", "message"],
        "properties": { "code": text, "message": text, "next": text },
    });
    json!({ "type": "object", "required": ["error"], "properties": { "error": fields } })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The routes as the router's source has them: method and path.
    fn routed() -> Vec<(String, String)> {
        let mut found = Vec::new();
        for line in include_str!("routes.rs").split(".route(").skip(1) {
            let (path, methods) = line.split_once(", ").unwrap();
            let path = path.trim().trim_matches('"').to_owned();
            let methods = methods.split("\n        .").next().unwrap();
            let each = ["get", "post", "delete", "put"].into_iter().filter(|method| {
                methods.starts_with(&format!("{method}(")) || methods.contains(&format!(").{method}("))
            });
            found.extend(each.map(|method| (method.to_owned(), path.clone())));
        }
        found
    }

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let mut routed = routed();
        assert!(routed.len() > 25, "{routed:?}");
        // One route serves several verbs.
        let verbs = ["scan", "attach", "detach", "forget", "destroy"];
        routed.retain(|(_, path)| path != "/srs/{sr}/{verb}");
        routed.extend(verbs.map(|verb| ("post".to_owned(), format!("/srs/{{sr}}/{verb}"))));
        let mut described: Vec<(String, String)> =
            ROUTES.iter().map(|(method, path, ..)| ((*method).to_owned(), (*path).to_owned())).collect();
        routed.sort();
        described.sort();
        assert_eq!(described, routed);
    }

    #[test]
    fn every_route_is_in_the_document() {
        let document = document();
        for (method, path, summary, _) in ROUTES {
            assert_eq!(document["paths"][path][method]["summary"], *summary);
        }
        let create = &document["paths"]["/vdis"]["post"]["requestBody"];
        let schema = &create["content"]["application/json"]["schema"];
        assert_eq!(schema["required"], json!(["sr", "name", "virtual_size"]));
    }
}
