//! Test binaries without cargo-nextest: all of the workspace are built in one go, and those that are wanted are run.
//!
//! `cargo test -p` would do both, but each choice of packages gives their dependencies other features, and cargo would build
//! most of them again. So the choice is made here, after one build with the features that everything else is built with.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Outcome;
use crate::artifacts::chaos_features;
use crate::tool::{cargo, typed};

/// A program that libtest made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestBinary {
    /// The package it tests.
    pub package: String,
    /// The name that nextest gives it: `package`, `package::test`, `package::bin/program`.
    pub id: String,
    /// The file.
    program: PathBuf,
    /// The package's folder, in which tests run.
    folder: PathBuf,
}

impl TestBinary {
    /// The program, to be run as cargo runs it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .current_dir(&self.folder)
            .env("CARGO_MANIFEST_DIR", &self.folder);
        command
    }

    /// Reads one line of cargo's JSON; `None` for whatever is no test binary.
    fn parse(line: &str) -> Option<Self> {
        let message: Value = serde_json::from_str(line).ok()?;
        if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
            return None;
        }
        let program = PathBuf::from(message["executable"].as_str()?);
        let package = package_name(message["package_id"].as_str()?)?.to_owned();
        let target = message["target"]["name"].as_str()?;
        let id = match message["target"]["kind"][0].as_str()? {
            "test" => format!("{package}::{target}"),
            "bin" => format!("{package}::bin/{target}"),
            _ => package.clone(),
        };
        let folder = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
        Some(Self {
            package,
            id,
            program,
            folder,
        })
    }
}

/// The name in a package's id: `path+file:///folder/name#version`, or `path+file:///folder#name@version`.
fn package_name(id: &str) -> Option<&str> {
    let (place, version) = id.rsplit_once('#')?;
    match version.split_once('@') {
        Some((name, _)) => Some(name),
        None => place.rsplit('/').next(),
    }
}

/// Builds the workspace's tests.
pub fn build() -> Outcome<Vec<TestBinary>> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--tests", "--no-run", "--quiet"]);
    command.args(["--features", &chaos_features()]);
    command.args(["--message-format", "json-render-diagnostics"]);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("{} cannot be started: {error}", typed(&command)))?;
    if !output.status.success() {
        return Err(format!("`{}` failed: {}", typed(&command), output.status));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(TestBinary::parse).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_binary_is_told_from_everything_else_that_cargo_reports() {
        let line = |kind: &str, test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"path+file:///d/state#drover-state@0.1.0",
                   "manifest_path":"/d/state/Cargo.toml","target":{{"kind":["{kind}"],"name":"rules"}},
                   "profile":{{"test":{test}}},"executable":"/t/rules-1"}}"#
            )
        };
        let id = |kind| TestBinary::parse(&line(kind, true)).map(|binary| binary.id);
        assert_eq!(id("test").as_deref(), Some("drover-state::rules"));
        assert_eq!(id("lib").as_deref(), Some("drover-state"));
        assert_eq!(id("bin").as_deref(), Some("drover-state::bin/rules"));
        assert_eq!(TestBinary::parse(&line("bin", false)), None);
        assert_eq!(TestBinary::parse(r#"{"reason":"build-finished"}"#), None);
    }

    #[test]
    fn a_package_is_named_by_its_id_in_both_forms() {
        assert_eq!(package_name("path+file:///d/xtask#0.1.0"), Some("xtask"));
        assert_eq!(
            package_name("path+file:///d/state#drover-state@0.1.0"),
            Some("drover-state")
        );
    }
}
