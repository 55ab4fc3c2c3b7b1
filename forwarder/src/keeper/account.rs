//! Accounts by name, from /etc/passwd and /etc/group.
//!
//! Read directly: the C library's lookup would load whatever name services are configured into a privileged process.

use std::path::Path;

use config::fault::{Code, Fault};
use rustix::fs::{Gid, Uid};
use serde::{Deserialize, Serialize};

/// A user account: whom the data plane runs as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
}

/// The account that the data plane runs as: `[control] user`, or `towpath` if there is one, or `nobody`.
///
/// # Errors
/// The named account does not exist, or is root.
pub fn data_plane_account(wanted: Option<&str>) -> Result<Account, Fault> {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    choose(wanted, &passwd)
}

fn choose(wanted: Option<&str>, passwd: &str) -> Result<Account, Fault> {
    let found = match wanted {
        Some(name) => find_user(passwd, name).ok_or_else(|| {
            Fault::new(Code::Invalid, "no such account")
                .field("control.user")
                .value(name)
                .remedy(format!("create it with: useradd --system --shell /usr/sbin/nologin {name}"))
        })?,
        // 65534 is nobody by convention where /etc/passwd does not say so, as in a minimal container.
        None => find_user(passwd, "towpath").or_else(|| find_user(passwd, "nobody")).unwrap_or(Account {
            name: "nobody".into(),
            uid: 65_534,
            gid: 65_534,
        }),
    };
    if found.uid == 0 {
        return Err(Fault::new(Code::Invalid, "the data plane may not run as root")
            .field("control.user")
            .value(found.name)
            .remedy("name an account without privileges"));
    }
    Ok(found)
}

fn find_user(passwd: &str, name: &str) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next() != Some(name) {
            return None;
        }
        let uid = fields.nth(1)?.parse().ok()?;
        Some(Account { name: name.into(), uid, gid: fields.next()?.parse().ok()? })
    })
}

/// The group whose members may use the control socket.
///
/// # Errors
/// It does not exist.
pub fn control_group(name: &str) -> Result<Gid, Fault> {
    find_group(Path::new("/etc/group"), name).ok_or_else(|| {
        Fault::new(Code::Invalid, "no such group")
            .field("control.group")
            .value(name)
            .remedy(format!("create it with: groupadd --system {name}"))
    })
}

fn find_group(file: &Path, name: &str) -> Option<Gid> {
    std::fs::read_to_string(file).ok()?.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next() != Some(name) {
            return None;
        }
        fields.nth(1)?.parse().ok().map(Gid::from_raw)
    })
}

impl Account {
    /// The user id, for system calls.
    pub fn uid(&self) -> Uid {
        Uid::from_raw(self.uid)
    }

    /// The primary group id, for system calls.
    pub fn gid(&self) -> Gid {
        Gid::from_raw(self.gid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65533:n:/:/bin/false\nbroken:x\n";

    #[test]
    fn chooses_towpath_then_nobody() {
        let towpath = format!("{PASSWD}towpath:x:990:991::/:/bin/false\n");
        assert_eq!(choose(None, &towpath).unwrap().uid, 990);
        assert_eq!(choose(None, PASSWD).unwrap().gid, 65_533);
        assert_eq!(choose(None, "").unwrap().uid, 65_534);
    }

    #[test]
    fn a_missing_account_and_root_are_refused_with_a_remedy() {
        let missing = choose(Some("gone"), PASSWD).unwrap_err().to_string();
        assert!(missing.contains("control.user: gone") && missing.contains("useradd"), "{missing}");
        assert!(choose(Some("root"), PASSWD).unwrap_err().to_string().contains("may not run as root"));
        assert!(choose(Some("broken"), PASSWD).is_err());
    }
}
