//! VMMs: which one it is, and what became of replacing it.

use drover_proto::v1;
use serde::Serialize;

use super::forecast::FindingView;
use super::{ReasonView, dash, some};
use crate::output::Tabular;
use crate::units::micros;

/// Which VMM it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmmView {
    /// Its version.
    pub version: String,
    /// The linker's build id; null: it has none.
    pub build: Option<String>,
}

impl From<v1::VmmBuild> for VmmView {
    fn from(vmm: v1::VmmBuild) -> Self {
        Self {
            version: vmm.version,
            build: some(vmm.build),
        }
    }
}

impl VmmView {
    /// Version and the beginning of the build id.
    pub fn line(&self) -> String {
        v1::VmmBuild {
            version: self.version.clone(),
            build: self.build.clone().unwrap_or_default(),
        }
        .to_string()
    }
}

/// What became of one VM's upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UpgradeView {
    /// The VM.
    pub vm: String,
    /// Its host.
    pub host: Option<String>,
    /// The VMM that ran it; null: it has not said which it is.
    pub before: Option<VmmView>,
    /// The VMM that is installed on its host; null: it could not be asked.
    pub installed: Option<VmmView>,
    /// The VMM that runs it now; null: as before.
    pub now: Option<VmmView>,
    /// `upgraded`, `up-to-date`, `aborted`, `refused`, `would-upgrade` or `not-tried`.
    pub outcome: &'static str,
    /// Why it was aborted or refused.
    pub reason: Option<ReasonView>,
    /// How long the guest stood still.
    pub blackout_us: Option<u64>,
    /// The migration that it was.
    pub migration: Option<String>,
    /// Of a dry run: what was looked at.
    pub findings: Vec<FindingView>,
}

impl UpgradeView {
    /// Of a VM that was not tried yet.
    pub fn new(vm: &v1::Vm, installed: Option<&v1::VmmBuild>) -> Self {
        let spec = vm.spec.clone().unwrap_or_default();
        let placement = vm.placement.clone().unwrap_or_default();
        Self {
            vm: spec.name,
            host: some(placement.host),
            before: vm.vmm.clone().map(VmmView::from),
            installed: installed.cloned().map(VmmView::from),
            now: None,
            outcome: "not-tried",
            reason: None,
            blackout_us: None,
            migration: None,
            findings: Vec::new(),
        }
    }

    /// Whether it runs in the VMM that is installed.
    pub fn is_up_to_date(&self) -> bool {
        self.before.is_some() && self.before == self.installed
    }

    /// The outcome in a sentence.
    pub fn sentence(&self) -> String {
        let vmm = |vmm: &Option<VmmView>| vmm.as_ref().map_or_else(|| "unknown".to_owned(), VmmView::line);
        let why = self.reason.as_ref().map(|reason| format!(": {}", reason.line()));
        let why = why.unwrap_or_default();
        let vm = &self.vm;
        match self.outcome {
            "upgraded" => format!(
                "{vm}: VMM {} -> {}, blackout {}",
                vmm(&self.before),
                vmm(&self.now),
                self.blackout_us.map_or_else(|| "unknown".to_owned(), micros)
            ),
            "up-to-date" => format!("{vm} runs in the installed VMM, {}", vmm(&self.before)),
            "would-upgrade" => format!("{vm}: nothing speaks against {}", vmm(&self.installed)),
            "not-tried" => format!("{vm} was not tried"),
            outcome => format!("{vm}: {outcome}{why}"),
        }
    }
}

impl Tabular for UpgradeView {
    const HEAD: &'static [&'static str] = &[
        "VM",
        "HOST",
        "BEFORE",
        "INSTALLED",
        "OUTCOME",
        "BLACKOUT",
        "MIGRATION",
    ];

    fn id(&self) -> &str {
        &self.vm
    }

    fn row(&self) -> Vec<String> {
        let vmm = |vmm: &Option<VmmView>| dash(vmm.as_ref().map(VmmView::line).as_deref());
        vec![
            self.vm.clone(),
            dash(self.host.as_deref()),
            vmm(&self.before),
            vmm(&self.installed),
            self.outcome.to_owned(),
            dash(self.blackout_us.map(micros).as_deref()),
            dash(self.migration.as_deref()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(build: &str) -> v1::VmmBuild {
        v1::VmmBuild {
            version: "0.1.0".into(),
            build: build.into(),
        }
    }

    fn vm(vmm: Option<v1::VmmBuild>) -> v1::Vm {
        v1::Vm {
            spec: Some(v1::VmSpec {
                name: "vm1".into(),
                ..Default::default()
            }),
            vmm,
            ..Default::default()
        }
    }

    #[test]
    fn only_a_vmm_that_is_known_to_be_the_installed_one_is_up_to_date() {
        let up_to_date =
            |runs, installed: Option<&v1::VmmBuild>| UpgradeView::new(&vm(runs), installed).is_up_to_date();
        assert!(up_to_date(Some(build("a1")), Some(&build("a1"))));
        assert!(!up_to_date(Some(build("a1")), Some(&build("a2"))));
        assert!(!up_to_date(None, None), "neither is known");
        assert!(!up_to_date(Some(build("a1")), None));
    }

    #[test]
    fn a_row_has_a_cell_for_each_heading_and_the_json_says_null_for_what_is_not_known() {
        let view = UpgradeView::new(&vm(None), Some(&build("0123456789abcdef")));
        assert_eq!(view.row().len(), UpgradeView::HEAD.len());
        assert_eq!(view.row()[3], "0.1.0 (0123456789ab)");
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["before"], serde_json::json!(null));
        assert_eq!(json["installed"]["build"], "0123456789abcdef");
    }
}
