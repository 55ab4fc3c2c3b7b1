//! Structures that know no networking: each has a slow twin in its tests.

pub mod flow_map;
pub mod lpm;
pub mod maglev;
pub mod paged;
pub mod record_ring;
pub mod spread;

/// Asks the processor for the first line of `item`, without waiting for it.
#[inline]
#[allow(unsafe_code)]
pub(crate) fn prefetch<T: ?Sized>(item: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch reads nothing architecturally and `item` is a valid reference.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(
            std::ptr::from_ref(item).cast(),
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = item;
}
