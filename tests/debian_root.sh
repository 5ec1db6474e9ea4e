# Sourced by docker.sh and other_python.sh: a bare Debian in a folder, with this checkout in it, and commands run inside.
# Needs Linux, root and mmdebstrap (Debian: apt install mmdebstrap).

# make_root FOLDER SUITE PACKAGES: as a container image begins, unless it is there; the checkout's tracked files in its /kdfast
make_root() {
  local checkout
  checkout=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
  [ -d "$1/etc" ] || mmdebstrap --quiet --variant=minbase --include="ca-certificates $3" "$2" "$1" http://deb.debian.org/debian
  cp /etc/resolv.conf "$1/etc/"
  cp /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/" # a proxy's among them, where there is one
  rm -rf "$1/kdfast" && mkdir "$1/kdfast"
  (cd "$checkout" && git ls-files -z | tar --null -T - -c) | tar -C "$1/kdfast" -x
}

# in_root FOLDER COMMAND: run in /kdfast of the root. It has pip's downloads and the caller's other place to look for packages; what
# is mounted for it is gone when the command ends, so that the folder can be removed.
in_root() {
  mkdir -p "$HOME/.cache/pip" "$1/root/.cache/pip" "$1${PIP_FIND_LINKS:-/tmp}"
  unshare --mount bash -euc '
    mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" && mount -t tmpfs tmpfs "$1/dev/shm"
    mount --bind "$HOME/.cache/pip" "$1/root/.cache/pip"
    [ ! -d "${PIP_FIND_LINKS:-}" ] || mount --bind "$PIP_FIND_LINKS" "$1$PIP_FIND_LINKS"
    exec chroot "$1" env -i HOME=/root PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin LANG=C.UTF-8 \
      SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS="${PIP_FIND_LINKS:-}" TORCH_BACKEND="${TORCH_BACKEND:-}" bash -euc "cd /kdfast && $2"
  ' in_root "$@"
}
