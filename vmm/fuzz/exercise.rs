//! What a fuzz target does with its bytes; the corpus test of the main workspace does the same.

use drover_vmm::boot::{HIGH_START, image};
use drover_vmm::save;

/// The guest that kernels are placed in, bytes.
const LOW_END: u64 = 64 << 20;

/// Whatever decodes must encode, and decode to the same.
#[allow(dead_code, reason = "each target uses one")]
pub fn save(bytes: &[u8]) {
    if let Ok(saved) = save::decode(bytes) {
        let again = save::encode(&saved);
        let back =
            save::decode(&again).unwrap_or_else(|fault| panic!("an encoded state is refused: {fault}"));
        assert_eq!(save::encode(&back), again, "a state changes by being encoded");
    }
}

/// Whatever is taken for a kernel must lie within the guest.
#[allow(dead_code, reason = "each target uses one")]
pub fn kernel(bytes: &[u8]) {
    if let Ok(parts) = image::parse(bytes).and_then(|kernel| kernel.parts(LOW_END)) {
        for part in parts {
            assert!(
                part.gpa >= HIGH_START && part.end <= LOW_END,
                "a part outside the guest"
            );
            assert!(
                part.gpa + part.bytes.len() as u64 <= part.end,
                "bytes beyond their part"
            );
        }
    }
}
