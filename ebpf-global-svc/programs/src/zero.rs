// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Zeros by words. The compiler makes `memset` of what it recognises as zeros, even of three bytes of padding;
//! that is a call here, and a loop over bytes.

use core::mem::MaybeUninit;

/// Makes all bytes of a value zero, where it is.
///
/// # Safety
/// That is a valid `T`.
#[inline(always)]
pub unsafe fn zero<T>(place: &mut MaybeUninit<T>) -> &mut T {
    const { assert!(size_of::<T>().is_multiple_of(4) && align_of::<T>() >= 4) }
    let words: *mut u32 = place.as_mut_ptr().cast();
    for n in 0..size_of::<T>() / 4 {
        // SAFETY: aligned, and within the value.
        unsafe { words.add(n).write_volatile(0) };
    }
    // SAFETY: every byte is written, and the caller's promise.
    unsafe { place.assume_init_mut() }
}
