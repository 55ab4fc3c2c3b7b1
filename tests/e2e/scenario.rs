//! How groups list their scenarios: each by the name of the upstream test that it stands for.

use anyhow::Result;

use crate::rig::Gateway;
use crate::test::Test;

/// A group of tests, as upstream describes it.
pub struct Group {
    /// What stands before the names, such as `Services`.
    pub name: &'static str,
    /// Its tests, every one of them.
    pub scenarios: &'static [Scenario],
}

/// One upstream test.
pub struct Scenario {
    /// Its name, without tags in brackets.
    pub upstream: &'static str,
    /// What stands for it here.
    pub ours: Ours,
}

/// What stands for an upstream test here.
pub enum Ours {
    /// A scenario.
    Runs {
        /// Where it is written: `services::basic_endpoint`.
        name: &'static str,
        /// The gateway that it needs.
        gateway: Gateway,
        /// It.
        body: fn(&mut Test) -> Result<()>,
    },
    /// Nothing, since no packet can decide it; why.
    NotApplicable(&'static str),
}

/// `run!("upstream name", function)` or `run!("upstream name", function(arguments))`; behind it, a gateway other than
/// `Frontend`.
macro_rules! run {
    ($upstream:literal, $body:ident $(($($argument:expr),+))?) => {
        run!($upstream, $body $(($($argument),+))?, Frontend)
    };
    ($upstream:literal, $body:ident $(($($argument:expr),+))?, $gateway:ident) => {
        $crate::scenario::Scenario {
            upstream: $upstream,
            ours: $crate::scenario::Ours::Runs {
                name: concat!(module_path!(), "::", stringify!($body)),
                gateway: $crate::rig::Gateway::$gateway,
                body: |test| $body(test $($(, $argument)+)?),
            },
        }
    };
}
pub(crate) use run;

/// An upstream test that no packet can decide.
pub const fn not_applicable(upstream: &'static str, why: &'static str) -> Scenario {
    Scenario { upstream, ours: Ours::NotApplicable(why) }
}
