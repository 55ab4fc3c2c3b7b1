//! Reads capture files as a stranger would: by the pcapng specification (draft-ietf-opsawg-pcapng), little-endian only.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

/// A packet of a capture file.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Name of its interface.
    pub interface: String,
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// Length on the wire, bytes.
    pub len: u32,
    /// What was kept.
    pub bytes: Vec<u8>,
    /// `epb_packetid`.
    pub id: u64,
    /// 1: inbound, 2: outbound (`epb_flags`).
    pub direction: u32,
    /// Its comment, which is words like `name=value`.
    pub comment: BTreeMap<String, String>,
}

/// Every packet of the file, in order.
///
/// # Errors
/// Anything that a strict reader would not take.
pub fn read(file: &[u8]) -> Result<Vec<Packet>> {
    let (mut rest, mut interfaces, mut packets) = (file, Vec::new(), Vec::new());
    let mut number = 0;
    while !rest.is_empty() {
        let len = word(rest, 4)? as usize;
        ensure!(len >= 12 && len.is_multiple_of(4) && len <= rest.len(), "block {number}: {len} bytes");
        ensure!(word(rest, len - 4)? as usize == len, "block {number} ends with another length");
        let (kind, body) = (word(rest, 0)?, &rest[8..len - 4]);
        match kind {
            0x0a0d_0d0a => {
                ensure!(
                    number == 0 && word(body, 0)? == 0x1a2b_3c4d && word(body, 4)? == 1,
                    "section header"
                );
            }
            1 => {
                ensure!(word(body, 0)? == 1, "interface {} is not Ethernet", interfaces.len());
                let options = options(&body[8..])?;
                ensure!(options.get(&9) == Some(&vec![9]), "resolution of interface {}", interfaces.len());
                let name = options.get(&2).context("an interface without a name")?;
                interfaces.push(String::from_utf8(name.clone())?);
            }
            6 => packets.push(packet(body, &interfaces).with_context(|| format!("block {number}"))?),
            other => bail!("block {number} is of type {other:#x}"),
        }
        rest = &rest[len..];
        number += 1;
    }
    Ok(packets)
}

fn packet(body: &[u8], interfaces: &[String]) -> Result<Packet> {
    let captured = word(body, 12)? as usize;
    let bytes = body.get(20..20 + captured).context("fewer bytes than were captured")?.to_vec();
    let options = options(body.get(20 + captured.next_multiple_of(4)..).unwrap_or_default())?;
    let comment = String::from_utf8(options.get(&1).context("no comment")?.clone())?;
    let id = options.get(&5).context("no packet id")?.as_slice();
    Ok(Packet {
        interface: interfaces.get(word(body, 0)? as usize).context("an unknown interface")?.clone(),
        time_ns: u64::from(word(body, 4)?) << 32 | u64::from(word(body, 8)?),
        len: word(body, 16)?,
        bytes,
        id: u64::from_le_bytes(id.try_into()?),
        direction: word(options.get(&2).context("no flags")?, 0)?,
        comment: comment
            .split(' ')
            .map(|word| word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())))
            .collect::<Option<_>>()
            .with_context(|| format!("comment {comment:?}"))?,
    })
}

/// Options by their code, up to the end of options.
fn options(bytes: &[u8]) -> Result<BTreeMap<u16, Vec<u8>>> {
    let (mut rest, mut options) = (bytes, BTreeMap::new());
    while !rest.is_empty() {
        let head = word(rest, 0)?;
        let (code, len) = (head as u16, (head >> 16) as usize);
        if code == 0 {
            ensure!(len == 0 && rest.len() == 4, "the end of options is not the end");
            break;
        }
        options.insert(code, rest.get(4..4 + len).context("an option that is cut")?.to_vec());
        rest = rest.get(4 + len.next_multiple_of(4)..).context("no end of options")?;
    }
    Ok(options)
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let word = bytes.get(at..at + 4).context("a block that is cut")?;
    Ok(u32::from_le_bytes(word.try_into()?))
}
