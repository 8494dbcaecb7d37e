//! The VMM that is installed on this host: which one it is, by its own word, asked again whenever the file changed.
//!
//! It is run for that, with `--version`, so that what is reported is known to run here at all: a program that is cut off, of another
//! architecture or lacks a library answers nothing, and an upgrade to it is refused beforehand.
//! Whether it can take a VM by post-copy it is asked as well, with `--post-copy`: that depends on what this user may do on this kernel. So does what
//! its sandbox is made of (`--sandbox`).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use drover_proto::v1::VmmBuild;
use tokio::process::Command;
use tokio::time::{Instant, timeout};

use super::images::Stamp;

/// A program that has not answered by then is none that should run a VM.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// One that did not answer is asked again after this, though it has not changed: the host may have been busy.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// Longest word of an answer that is believed, characters.
const WORD_MAX: usize = 64;
/// What is kept of why it cannot do post-copy, characters.
const WHY_MAX: usize = 300;
/// What it says when it can.
const OK: &str = "ok";

/// See the module.
pub struct Installed {
    program: PathBuf,
    asked: Option<(Option<Stamp>, Instant)>,
    build: Option<VmmBuild>,
    post_copy: String,
    /// How it is asked for its sandbox.
    sandbox_question: String,
    sandbox: Result<String, String>,
}

impl Installed {
    /// Nothing is asked yet.
    pub fn new(program: &Path, sandbox_question: String) -> Self {
        Self {
            program: program.to_owned(),
            asked: None,
            build: None,
            post_copy: String::new(),
            sandbox_question,
            sandbox: Err("it was not asked".to_owned()),
        }
    }

    /// `ok`, or why it cannot take a VM by post-copy; empty as long as it was not asked.
    pub fn post_copy(&self) -> &str {
        &self.post_copy
    }

    /// What it says of its sandbox, `ok` or what that lacks here; the error: it knows none.
    pub fn sandbox(&self) -> &Result<String, String> {
        &self.sandbox
    }

    /// What the program said of itself last; `None` when it could not be asked.
    pub fn build(&self) -> Option<VmmBuild> {
        self.build.clone()
    }

    /// Looks at the file, and asks the program if it is another. Says whether the answer is another.
    pub async fn look(&mut self) -> bool {
        let stamp = std::fs::metadata(&self.program).ok().as_ref().map(Stamp::of);
        if let Some((known, at)) = &self.asked {
            let patient = (self.build.is_some() && self.post_copy == OK) || at.elapsed() < ASK_AGAIN;
            if *known == stamp && patient {
                return false;
            }
        }
        self.asked = Some((stamp, Instant::now()));
        let (build, post_copy, sandbox) = tokio::join!(
            ask(&self.program),
            ask_post_copy(&self.program),
            ask_sandbox(&self.program, &self.sandbox_question)
        );
        let build = match build {
            Ok(build) => Some(build),
            Err(why) => {
                tracing::warn!(
                    "{}: which VMM it is cannot be told: {why}",
                    self.program.display()
                );
                None
            }
        };
        let changed = build != self.build || post_copy != self.post_copy || sandbox != self.sandbox;
        self.sandbox = sandbox;
        if post_copy != self.post_copy {
            tracing::info!("post-copy to this host: {post_copy}");
        }
        self.post_copy = post_copy;
        if let Some(build) = build.as_ref().filter(|_| changed) {
            tracing::info!(version = build.version, build = build.build, "the installed VMM");
        }
        self.build = build;
        changed
    }
}

fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default().trim();
    line.chars().take(WHY_MAX).collect()
}

async fn ask_sandbox(program: &Path, question: &str) -> Result<String, String> {
    let told = answer(program, question).await;
    // One of before sandboxes does not know the question.
    let told = told.map_err(|why| format!("the installed VMM cannot say what it has: {why}"))?;
    Ok(first_line(&told))
}

async fn ask_post_copy(program: &Path) -> String {
    match answer(program, "--post-copy").await {
        Ok(text) => first_line(&text),
        // One of before post-copy does not know the question.
        Err(why) => format!("the installed VMM cannot say whether it can: {why}"),
    }
}

async fn answer(program: &Path, question: &str) -> Result<String, String> {
    let answer = Command::new(program)
        .arg(question)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(ANSWER_MAX, answer)
        .await
        .map_err(|_| format!("no answer to {question} in {} s", ANSWER_MAX.as_secs()))?
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(format!("{question} ended with {}", output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn ask(program: &Path) -> Result<VmmBuild, String> {
    let text = answer(program, "--version").await?;
    parse(&text).ok_or_else(|| {
        let shown: String = text.chars().take(WORD_MAX).collect();
        format!("its answer to --version is {shown:?}; \"drover-vmm 1.2.3 build 0a1b…\" is due")
    })
}

fn parse(text: &str) -> Option<VmmBuild> {
    let mut words = text.split_whitespace();
    let (name, version) = (words.next()?, words.next()?);
    let build = match (words.next(), words.next(), words.next()) {
        (None, ..) => "",
        (Some("build"), Some(build), None) => build,
        _ => return None,
    };
    let sound = name == "drover-vmm"
        && version.starts_with(|first: char| first.is_ascii_digit())
        && build.bytes().all(|byte| byte.is_ascii_hexdigit())
        && version.len().max(build.len()) <= WORD_MAX;
    sound.then(|| VmmBuild {
        version: version.to_owned(),
        build: build.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Puts a script in the program's place, as a package manager does: a new file over the old name.
    fn install(program: &Path, script: &str) {
        let staged = program.with_extension("new");
        fs::write(&staged, script).unwrap();
        fs::set_permissions(&staged, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&staged, program).unwrap();
    }

    #[test]
    fn only_a_vmms_answer_is_taken() {
        let build = |version: &str, build: &str| {
            Some(VmmBuild {
                version: version.to_owned(),
                build: build.to_owned(),
            })
        };
        assert_eq!(parse("drover-vmm 0.1.0 build 0aff\n"), build("0.1.0", "0aff"));
        assert_eq!(parse("drover-vmm 0.2.0-rc1\n"), build("0.2.0-rc1", ""));
        for wrong in [
            "",
            "drover-vmm",
            "qemu 7.2",
            "drover-vmm new",
            "drover-vmm 1.0 build",
            "drover-vmm 1.0 build x/",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
        let long = format!("drover-vmm 1.0 build {}", "a".repeat(WORD_MAX + 1));
        assert_eq!(parse(&long), None);
    }

    #[tokio::test]
    async fn another_program_in_its_place_is_noticed_and_one_that_does_not_run_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("drover-vmm");
        let mut installed = Installed::new(&program, "--sandbox".to_owned());
        installed.look().await;
        assert!(installed.build().is_none());
        install(&program, "#!/bin/sh\necho drover-vmm 0.1.0 build 01\n");
        assert!(installed.look().await);
        assert_eq!(installed.build().unwrap().build, "01");
        assert!(!installed.look().await, "nothing changed");
        install(&program, "#!/bin/sh\necho drover-vmm 0.1.0 build 02\n");
        assert!(installed.look().await);
        assert_eq!(installed.build().unwrap().build, "02");
        install(&program, "#!/bin/sh\nexit 1\n");
        assert!(installed.look().await);
        assert_eq!(installed.build(), None);
        assert!(installed.post_copy().contains("--post-copy ended with"));
        install(
            &program,
            "#!/bin/sh\ntest $1 = --version && echo drover-vmm 0.1.0 || echo ok\n",
        );
        assert!(installed.look().await);
        assert_eq!(installed.post_copy(), OK);
        install(
            &program,
            "#!/bin/sh\ntest $1 = --version && echo drover-vmm 0.1.0 || echo no such file\n",
        );
        assert!(installed.look().await, "only that changed");
        assert_eq!(installed.post_copy(), "no such file");
    }
}
