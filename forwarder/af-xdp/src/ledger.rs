//! Who owns each chunk: one word a chunk, in memory that outlives the process.
//!
//! The word is the only truth about ownership. A [`Frame`](crate::Frame) of a chunk exists only while its word says
//! [`Owner::Free`], [`Owner::Peeked`], [`Owner::Rewriting`] or [`Owner::Held`]; a descriptor that the kernel hands over
//! is believed only if the word says that the kernel had the chunk, so forged or repeated descriptors are refused.
//!
//! A process that is killed stops between two instructions, and everything that it stored before becomes visible. So
//! each step stores the word *before* the index that makes the step visible to the kernel, and only the order in which
//! the compiler emits the stores matters:
//!
//! | step | order of the stores |
//! | --- | --- |
//! | fill | slot, word = `Fill{port, index}`, then the producer of the fill ring |
//! | receive | word = `Peeked`; the consumer of the RX ring moves only after the whole burst went on |
//! | change bytes | the old bytes into the journal, word = `Rewriting`, then the bytes |
//! | transmit | all slots of a packet, the words = `Tx{port, index}`, then the producer of the TX ring |
//! | complete | word = `Free`, then the consumer of the completion ring, then reuse |
//! | release RX | what is still `Peeked` becomes `Held`, then the consumer of the RX ring |

/// Who has a chunk. `port` is the index of the socket among those that share the UMEM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// Nobody: in the free list of the process, or in a frame that it fills itself.
    Free,
    /// The kernel, once the producer of the port's fill ring has passed `index`; it comes back by the RX ring.
    Fill {
        /// Socket.
        port: u8,
        /// Where it stands in the fill ring.
        index: u32,
    },
    /// A frame that was received and not changed yet; its entry in the RX ring is not released.
    Peeked {
        /// Socket.
        port: u8,
    },
    /// A frame that was received and is being changed. `slot` of the journal holds its first bytes as they came;
    /// `None`: they cannot be had back.
    Rewriting {
        /// Slot of the journal.
        slot: Option<u16>,
    },
    /// A frame that the process kept beyond the release of its RX entry (a packet that waits for its next hop).
    Held,
    /// The kernel, once the producer of the port's TX ring has passed `index`; it comes back by the completion ring.
    Tx {
        /// Socket.
        port: u8,
        /// Where it stands in the TX ring.
        index: u32,
    },
}

const NO_SLOT: u16 = u16::MAX;

/// [`Owner`] in a word: state in bits 0 to 7, port in 8 to 15, journal slot in 16 to 31, ring index in 32 to 63.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub(crate) struct Word(pub(crate) u64);

impl Word {
    const FREE: u64 = 0;
    const FILL: u64 = 1;
    const PEEKED: u64 = 2;
    const REWRITING: u64 = 3;
    const HELD: u64 = 4;
    const TX: u64 = 5;

    #[inline]
    pub(crate) const fn new(owner: Owner) -> Word {
        Word(match owner {
            Owner::Free => Self::FREE,
            Owner::Fill { port, index } => Self::FILL | (port as u64) << 8 | (index as u64) << 32,
            Owner::Peeked { port } => Self::PEEKED | (port as u64) << 8,
            Owner::Rewriting { slot } => {
                let slot = match slot {
                    Some(slot) => slot,
                    None => NO_SLOT,
                };
                Self::REWRITING | (slot as u64) << 16
            }
            Owner::Held => Self::HELD,
            Owner::Tx { port, index } => Self::TX | (port as u64) << 8 | (index as u64) << 32,
        })
    }

    /// The owner; a word that no version of this crate wrote counts as [`Owner::Held`], which recovery frees.
    #[inline]
    pub(crate) const fn owner(self) -> Owner {
        let port = (self.0 >> 8) as u8;
        let slot = (self.0 >> 16) as u16;
        let index = (self.0 >> 32) as u32;
        match self.0 & 0xff {
            Self::FREE => Owner::Free,
            Self::FILL => Owner::Fill { port, index },
            Self::PEEKED => Owner::Peeked { port },
            Self::REWRITING => Owner::Rewriting { slot: if slot == NO_SLOT { None } else { Some(slot) } },
            Self::TX => Owner::Tx { port, index },
            _ => Owner::Held,
        }
    }

    /// True if the kernel may hand the chunk over by `port`'s RX ring.
    #[inline]
    pub(crate) const fn is_fill_of(self, port: u8) -> bool {
        self.0 & 0xffff == Self::FILL | (port as u64) << 8
    }

    /// True if the kernel may hand the chunk back by `port`'s completion ring.
    #[inline]
    pub(crate) const fn is_tx_of(self, port: u8) -> bool {
        self.0 & 0xffff == Self::TX | (port as u64) << 8
    }

    /// True while the frame was received and is as it came.
    #[inline]
    pub(crate) const fn is_peeked(self) -> bool {
        self.0 & 0xff == Self::PEEKED
    }

    /// True while the frame was received and changed.
    #[inline]
    pub(crate) const fn is_rewriting(self) -> bool {
        self.0 & 0xff == Self::REWRITING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_owner_survives_the_round_trip() {
        let owners = [
            Owner::Free,
            Owner::Fill { port: 0, index: 0 },
            Owner::Fill { port: 255, index: u32::MAX },
            Owner::Peeked { port: 3 },
            Owner::Rewriting { slot: None },
            Owner::Rewriting { slot: Some(0) },
            Owner::Rewriting { slot: Some(255) },
            Owner::Held,
            Owner::Tx { port: 1, index: 7 },
            Owner::Tx { port: 255, index: u32::MAX },
        ];
        for owner in owners {
            let word = Word::new(owner);
            assert_eq!(word.owner(), owner);
            assert_eq!(word.is_fill_of(3), matches!(owner, Owner::Fill { port: 3, .. }));
            assert_eq!(word.is_tx_of(1), matches!(owner, Owner::Tx { port: 1, .. }));
            assert_eq!(word.is_peeked(), matches!(owner, Owner::Peeked { .. }));
            assert_eq!(word.is_rewriting(), matches!(owner, Owner::Rewriting { .. }));
        }
        assert_eq!(Word(0x77).owner(), Owner::Held);
    }
}
