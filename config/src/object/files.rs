//! Files of manifests, as kubectl's `-f` takes them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The manifests of a folder (`.yaml`, `.yml`, `.json`) by name; `recursive`: of the folders within it too.
///
/// # Errors
/// Names the folder that cannot be read.
pub fn folder(path: &Path, recursive: bool) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = entries.map_err(|cause| {
        io::Error::new(cause.kind(), format!("cannot read folder {}: {cause}", path.display()))
    })?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let is_manifest =
            path.extension().and_then(|e| e.to_str()).is_some_and(|e| matches!(e, "yaml" | "yml" | "json"));
        if path.is_dir() {
            if recursive {
                files.extend(folder(&path, recursive)?);
            }
        } else if is_manifest {
            files.push(path);
        }
    }
    Ok(files)
}
