//! Structures that know no networking: each has a slow twin in its tests.

pub mod flow_map;
pub mod lpm;
pub mod maglev;
pub mod paged;
pub mod record_ring;
pub mod spread;

/// Most lines of one item that are asked for: more of them would push each other out of the processor's few buffers.
const LINES_MAX: usize = 8;

/// Asks the processor for the lines of `item`, without waiting for them.
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) fn prefetch<T: ?Sized>(item: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    for offset in (0..size_of_val(item)).step_by(64).take(LINES_MAX) {
        // SAFETY: a prefetch reads nothing architecturally, and the address lies within a valid reference.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(
                std::ptr::from_ref(item).cast::<i8>().add(offset),
            );
        }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = (item, LINES_MAX);
}
