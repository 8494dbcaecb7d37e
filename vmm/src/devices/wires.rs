//! How a device on the PCI bus and KVM reach each other without an exit to a vCPU's thread: messages one way, doorbells the other.
//!
//! A message is a line with a number that KVM routes, rung through an eventfd; a doorbell is an address whose write rings one.
//!
//! Routing is replaced as a whole (Linux, Documentation/virt/kvm/api.rst, KVM_SET_GSI_ROUTING), so the lines of the I/O APIC and the
//! 8259s, which KVM routes by itself until the first call, are told with the rest. A VM without message lines never makes that call.

use std::sync::{Arc, Mutex, MutexGuard};

use drover_proto::{Code, Fault};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use tracing::{debug, error};
use vmm_sys_util::eventfd::EventFd;

use super::complaints::complain;
use super::pci::msix::Message;

/// Inputs of the I/O APIC; messages are numbered after them.
const IO_APIC_PINS: u32 = 24;
/// Inputs of each 8259.
const PIC_PINS: u32 = 8;

fn chip(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

/// What KVM routes by default: every line to the pin of its number, the ISA lines to the 8259s too.
fn legacy() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::new();
    for gsi in 0..IO_APIC_PINS {
        entries.push(chip(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        match gsi {
            0..PIC_PINS => entries.push(chip(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            PIC_PINS..16 => entries.push(chip(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC_PINS)),
            _ => {}
        }
    }
    entries
}

fn message(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let [low, high] = [message.address, message.address >> 32]
        .map(|part| u32::try_from(part & u64::from(u32::MAX)).expect("32 bits"));
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: low,
                address_hi: high,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

/// A device's wires.
pub trait Wires: Send + Sync {
    /// Sends `message` as vector `vector`.
    fn send(&self, vector: usize, message: Message);
    /// The doorbells of the device's queues, [`DOORBELL_STRIDE`] apart, are now at this address and nowhere else.
    fn place_doorbells(&self, gpa: Option<u64>);
}

/// Bytes between the doorbells of two queues.
pub const DOORBELL_STRIDE: u64 = 4;

/// A message line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Route {
    /// Nobody's.
    Free,
    /// A device's that has sent nothing yet.
    Silent,
    /// Routed to this message.
    To(Message),
}

/// All message lines of a VM.
pub struct Router {
    vm: Arc<VmFd>,
    /// By line.
    routes: Mutex<Vec<Route>>,
}

impl Router {
    /// No lines yet.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            routes: Mutex::default(),
        })
    }

    /// `count` message lines, and doorbells for `queues` queues that ring `bell`.
    pub fn wires(self: &Arc<Self>, count: usize, queues: usize, bell: EventFd) -> Result<KvmWires, Fault> {
        let failed = |error: std::io::Error| {
            Fault::new(Code::VmmStartFailed, format!("a device's interrupt: {error}"))
        };
        let mut wires = KvmWires {
            router: self.clone(),
            lines: Vec::with_capacity(count),
            queues,
            bell,
            placed: Mutex::default(),
        };
        for _ in 0..count {
            let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
            let line = self.take_line();
            let told = self.vm.register_irqfd(&fd, gsi_of(line));
            told.map_err(|error| {
                self.routes()[line] = Route::Free;
                failed(error.into())
            })?;
            wires.lines.push((line, fd));
        }
        Ok(wires)
    }

    fn routes(&self) -> MutexGuard<'_, Vec<Route>> {
        self.routes.lock().expect("no holder of the routes' lock panics")
    }

    /// A line that was nobody's.
    fn take_line(&self) -> usize {
        let mut routes = self.routes();
        let free = routes.iter().position(|route| *route == Route::Free);
        let line = free.unwrap_or(routes.len());
        if free.is_none() {
            routes.push(Route::Free);
        }
        routes[line] = Route::Silent;
        line
    }

    fn route(&self, line: usize, to: Message) {
        let mut routes = self.routes();
        if routes[line] == Route::To(to) {
            return;
        }
        routes[line] = Route::To(to);
        let mut entries = legacy();
        entries.extend(routes.iter().enumerate().filter_map(|(line, route)| match route {
            Route::To(to) => Some(message(gsi_of(line), *to)),
            Route::Free | Route::Silent => None,
        }));
        let routed = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| format!("{error:?}"))
            .and_then(|routing| {
                self.vm
                    .set_gsi_routing(&routing)
                    .map_err(|error| error.to_string())
            });
        if let Err(error) = routed {
            // Only the guest's choice of a message can be at fault: it gets no interrupt then.
            complain(|| format!("KVM does not route a device's interrupt to {to:?}: {error}"));
        }
    }
}

fn gsi_of(line: usize) -> u32 {
    IO_APIC_PINS + u32::try_from(line).expect("a VM has few lines")
}

/// The wires of one device.
pub struct KvmWires {
    router: Arc<Router>,
    /// By vector: the line and what rings it.
    lines: Vec<(usize, EventFd)>,
    queues: usize,
    bell: EventFd,
    placed: Mutex<Option<u64>>,
}

impl KvmWires {
    /// Tells KVM of the doorbells from `base` on, or that they are no more. Where KVM refuses, a write is an exit that rings the same bell.
    fn tell(&self, base: u64, there: bool) {
        for queue in 0..self.queues {
            let at = IoEventAddress::Mmio(base + DOORBELL_STRIDE * queue as u64);
            let number = u16::try_from(queue).expect("a device has few queues");
            let told = if there {
                self.router.vm.register_ioevent(&self.bell, &at, number)
            } else {
                self.router.vm.unregister_ioevent(&self.bell, &at, number)
            };
            if let Err(error) = told {
                debug!(%error, there, queue, "KVM takes no doorbell; it rings through an exit");
            }
        }
    }
}

impl Wires for KvmWires {
    fn send(&self, vector: usize, message: Message) {
        let (line, bell) = &self.lines[vector];
        self.router.route(*line, message);
        if let Err(error) = bell.write(1) {
            error!(%error, vector, "a device's interrupt cannot be sent");
        }
    }

    fn place_doorbells(&self, gpa: Option<u64>) {
        let mut placed = self.placed.lock().expect("no holder of this lock panics");
        if *placed == gpa {
            return;
        }
        if let Some(old) = placed.take() {
            self.tell(old, false);
        }
        if let Some(new) = gpa {
            self.tell(new, true);
        }
        *placed = gpa;
    }
}

impl Drop for KvmWires {
    /// Its lines are free for the next device; their routes are replaced with the next message that anybody sends.
    fn drop(&mut self) {
        self.place_doorbells(None);
        for (line, bell) in &self.lines {
            if let Err(error) = self.router.vm.unregister_irqfd(bell, gsi_of(*line)) {
                debug!(%error, line, "KVM keeps an interrupt's line");
            }
            self.router.routes()[*line] = Route::Free;
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code, reason = "KVM's routes are unions")]
mod tests {
    use super::*;

    #[test]
    fn legacy_lines_go_to_the_pins_that_kvm_gives_them_by_itself() {
        let entries = legacy();
        assert_eq!(entries.len(), 24 + 16);
        for entry in entries {
            // SAFETY: every legacy route is of a chip.
            let to = unsafe { entry.u.irqchip };
            let pin = if to.irqchip == KVM_IRQCHIP_PIC_SLAVE {
                entry.gsi - 8
            } else {
                entry.gsi
            };
            assert_eq!(to.pin, pin);
        }
    }

    #[test]
    fn a_message_keeps_both_halves_of_its_address() {
        let entry = message(
            30,
            Message {
                address: 0x1_fee0_1000,
                data: 0x41,
            },
        );
        // SAFETY: it was made as a message.
        let msi = unsafe { entry.u.msi };
        assert_eq!((msi.address_lo, msi.address_hi, msi.data), (0xfee0_1000, 1, 0x41));
    }
}
