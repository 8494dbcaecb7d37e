//! The KVM ABI's structures as bytes and back: how they travel in a save-state.
//!
//! The kernel fixes these layouts for ever (Linux, Documentation/virt/kvm/api.rst), so their bytes are the format. A length
//! that is not exactly the structure's is refused.
#![allow(unsafe_code, reason = "KVM's structures are read as bytes and back")]

use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

/// A structure of the KVM ABI.
///
/// # Safety
/// The type is `repr(C)`, has no padding that the compiler added, and any bytes are a valid value of it.
pub unsafe trait Abi: Sized {}

macro_rules! abi {
    ($($name:ty),* $(,)?) => { $(
        // SAFETY: fixed by the kernel's ABI as integers and arrays of integers with explicit padding (for the two with
        // unions, every member is such a structure and the largest covers the whole).
        unsafe impl Abi for $name {}
    )* };
}
abi!(
    kvm_mp_state,
    kvm_regs,
    kvm_sregs,
    kvm_xsave,
    kvm_xcrs,
    kvm_debugregs,
    kvm_lapic_state,
    kvm_vcpu_events,
    kvm_irqchip,
    kvm_pit_state2,
);

/// The structure's bytes.
pub fn to_bytes<T: Abi>(value: &T) -> Vec<u8> {
    // SAFETY: `Abi` promises a plain structure without compiler-added padding, so all `size_of::<T>()` bytes are
    // initialised; the slice does not outlive the borrow.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }.to_vec()
}

/// The structure that `bytes` holds, or the length that would be right.
pub fn from_bytes<T: Abi>(bytes: &[u8]) -> Result<T, usize> {
    if bytes.len() != size_of::<T>() {
        return Err(size_of::<T>());
    }
    // SAFETY: the length was checked, `Abi` promises that any bytes are a valid value, and the read is unaligned.
    Ok(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast::<T>()) })
}

/// A value with every byte zero.
pub fn zeroed<T: Abi>() -> T {
    // SAFETY: `Abi` promises that any bytes, so also zeroes, are a valid value.
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_survives_its_bytes_and_another_length_is_refused() {
        let regs = kvm_regs {
            rip: 0x1234_5678_9abc_def0,
            rflags: 2,
            ..Default::default()
        };
        let bytes = to_bytes(&regs);
        assert_eq!(from_bytes::<kvm_regs>(&bytes), Ok(regs));
        assert_eq!(from_bytes::<kvm_regs>(&bytes[1..]), Err(bytes.len()));
        assert_eq!(
            from_bytes::<kvm_regs>(&[bytes.as_slice(), &[0]].concat()),
            Err(bytes.len())
        );
    }
}
