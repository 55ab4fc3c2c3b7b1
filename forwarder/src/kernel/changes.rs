//! What happened to the ports' interfaces, in words for the log.

use std::collections::BTreeMap;

use super::snapshot::Link;

/// One sentence for each change that an operator of `ports` (interface names) wants to know of.
///
/// An interface that was deleted and created again has another index: sockets and the steering program are bound to the
/// old one, which is why that is said.
pub fn of_ports(ports: &[String], before: &BTreeMap<u32, Link>, after: &BTreeMap<u32, Link>) -> Vec<String> {
    let find =
        |links: &BTreeMap<u32, Link>, name: &str| links.values().find(|link| link.name == name).cloned();
    let mut said = Vec::new();
    for name in ports {
        let (old, new) = match (find(before, name), find(after, name)) {
            (None, None) => continue,
            (Some(_), None) => {
                said.push(format!("interface {name} is gone: its port is down"));
                continue;
            }
            (None, Some(new)) => {
                said.push(format!("interface {name} is there, index {}", new.index));
                continue;
            }
            (Some(old), Some(new)) => (old, new),
        };
        if old.index != new.index {
            let (from, to) = (old.index, new.index);
            said.push(format!(
                "interface {name} was created anew (index {from} is now {to}): its port must be bound again"
            ));
        }
        if old.up != new.up {
            said.push(format!(
                "interface {name} is {}",
                if new.up { "up" } else { "down or without a carrier" }
            ));
        }
        if old.mtu != new.mtu {
            said.push(format!("interface {name} has MTU {} instead of {}", new.mtu, old.mtu));
        }
        if old.mac != new.mac {
            said.push(format!("interface {name} has another link-layer address"));
        }
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(index: u32, mtu: u32, up: bool) -> BTreeMap<u32, Link> {
        [(index, Link { index, name: "g0".into(), mac: Some([2; 6]), mtu, up })].into()
    }

    #[test]
    fn every_change_is_said_once() {
        let ports = ["g0".to_owned()];
        let say = |before, after| of_ports(&ports, &before, &after);
        assert!(say(links(2, 1500, true), links(2, 1500, true)).is_empty());
        assert!(say(BTreeMap::new(), BTreeMap::new()).is_empty());
        assert!(say(links(2, 1500, true), BTreeMap::new())[0].contains("gone"));
        assert!(say(BTreeMap::new(), links(2, 1500, true))[0].contains("index 2"));
        let all = say(links(2, 1500, true), links(7, 9000, false));
        assert_eq!(all.len(), 3, "{all:?}");
        assert!(all[0].contains("index 2 is now 7"));
    }
}
