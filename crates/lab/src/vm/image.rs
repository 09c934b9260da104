//! What virtual machines boot: a kernel, and the files that they begin with. `scripts/vm image` makes both.

use std::path::{Path, PathBuf};

use anyhow::bail;

/// A folder with `vmlinuz` and `initrd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image(PathBuf);

impl Image {
    /// The image in this folder, whatever there is of it.
    pub(crate) fn at(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    /// The same, if it is there.
    pub(crate) fn open(folder: &Path) -> anyhow::Result<Self> {
        let image = Self::at(&std::path::absolute(folder)?);
        for file in [image.kernel(), image.files()] {
            if !file.is_file() {
                bail!(
                    "there is no {}: make an image with 'scripts/vm image', which prints its folder",
                    file.display()
                );
            }
        }
        Ok(image)
    }

    /// The folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.0
    }

    /// Linux, as it is booted.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.0.join("vmlinuz")
    }

    /// What the kernel finds in memory: programs, libraries and modules.
    pub(crate) fn files(&self) -> PathBuf {
        self.0.join("initrd")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_whole_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |folder: &Path| Image::open(folder).unwrap_err().to_string();
        assert!(refused(Path::new("/no/such")).contains("scripts/vm image"));
        std::fs::write(folder.path().join("vmlinuz"), "").unwrap();
        assert!(refused(folder.path()).contains("initrd"));
        std::fs::write(folder.path().join("initrd"), "").unwrap();
        Image::open(folder.path()).unwrap();
    }
}
