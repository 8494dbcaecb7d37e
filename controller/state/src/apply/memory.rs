//! How much of its memory a VM's guest is to have.
//!
//! The specification says it, so that starts, migrations and restarts agree, with a revision that rises with each change: the VMM keeps the
//! highest that it was told, also over a migration, and its agent tells it where the specification's is higher. So a change needs no moment
//! at which the VM is not being moved: the target learns of it, from the state that it takes over or from its own agent.
//!
//! A host's room is counted by what the VM was created with, however little its guest has at the moment: a guest takes back what it needs
//! when it boots again, or where it has no other memory left.

use drover_proto::v1::{Balloon, SetVmMemory};
use drover_proto::{Code, Fault};

use super::{Applied, Tx};
use crate::limits::MEMORY_MIB_MIN;
use crate::state::spec_of;

impl Tx<'_> {
    pub(super) fn set_vm_memory(&mut self, set: &SetVmMemory) -> Applied {
        let name = &set.vm;
        let vm = self.known_vm("vm", name)?;
        if vm.deleting {
            let message = format!("vm is {name}, which is being deleted");
            return Err(Fault::new(Code::VmState, message).field("vm"));
        }
        let spec = spec_of(vm);
        if spec.balloon() != Balloon::On {
            let message = format!(
                "vm is {name}, which has no balloon: its guest cannot be asked for memory; a balloon is a VM's from its creation on"
            );
            return Err(Fault::new(Code::VmState, message).field("vm"));
        }
        let (asked, most) = (set.memory_mib, spec.memory_mib);
        if !(MEMORY_MIB_MIN..=most).contains(&asked) {
            let message = format!(
                "memory_mib is {asked}; {MEMORY_MIB_MIN} to the {most} that {name} was created with are possible"
            );
            return Err(Fault::new(Code::InvalidArgument, message).field("memory_mib"));
        }
        let target = if asked == most { 0 } else { asked };
        if spec.memory_target_mib != target {
            let now_ms = self.now_ms;
            let vm = self.vm_mut(name);
            vm.changed_ms = now_ms;
            let spec = vm.spec.get_or_insert_default();
            spec.memory_target_mib = target;
            spec.memory_revision += 1;
            let caller = self.caller;
            self.vm_event(
                "vm.memory",
                name,
                format!("{caller} wants {name} to have {asked} MiB of its {most}"),
            );
        }
        Ok(self.vm_response(name, true))
    }
}
