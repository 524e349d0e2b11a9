package strait

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const dataSocket = "data.sock"

// Directory is the runtime directory of the host that address names (unix:///run/strait). For an
// empty address it is $STRAIT_ADDRESS's, or else the first of $RUNTIME_DIRECTORY,
// $XDG_RUNTIME_DIR/strait, /run/strait (as root) and /tmp/strait-UID that has a data socket.
//
// The error is ErrArgument for an address that is of another form, ErrNoHost if there is none.
func Directory(address string) (string, error) {
	return findDirectory(address, os.Getenv, os.Geteuid())
}

func findDirectory(address string, environment func(string) string, uid int) (string, error) {
	if address == "" {
		address = environment("STRAIT_ADDRESS")
	}
	if address != "" {
		path, ok := strings.CutPrefix(address, "unix://")
		if !ok || !strings.HasPrefix(path, "/") {
			return "", argumentError("address %q is not of the form unix:///DIRECTORY (an absolute path); "+
				"other hosts are reached by Connect", address)
		}
		return path, nil
	}
	var places []string
	if directory := environment("RUNTIME_DIRECTORY"); directory != "" {
		places = append(places, directory)
	}
	if directory := environment("XDG_RUNTIME_DIR"); directory != "" {
		places = append(places, filepath.Join(directory, "strait"))
	}
	if uid == 0 {
		places = append(places, "/run/strait")
	}
	for _, place := range places {
		if hasSocket(place) {
			return place, nil
		}
	}
	shared := "/tmp/strait-" + strconv.Itoa(uid)
	if hasSocket(shared) {
		return shared, checkOwner(shared, uid)
	}
	places = append(places, shared)
	return "", fmt.Errorf("strait: %w: none of %s has a %s; start one with `strait serve`, or name its directory "+
		"by an address (unix:///DIRECTORY) or in STRAIT_ADDRESS", ErrNoHost, strings.Join(places, ", "), dataSocket)
}

func hasSocket(directory string) bool {
	_, err := os.Stat(filepath.Join(directory, dataSocket))
	return err == nil
}

// checkOwner looks at the one place that anybody can create: somebody else may have planted it.
func checkOwner(directory string, uid int) error {
	// Not Stat: a link would answer with the owner of its target.
	info, err := os.Lstat(directory)
	if err != nil {
		return fmt.Errorf("strait: %w: %w", ErrNoHost, err)
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || int(owner.Uid) != uid || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("strait: %w: %s is %s and not a directory that belongs to uid %d and that only it can write to: "+
			"remove it, or name the host's directory by an address", ErrNoHost, directory, describe(info, owner), uid)
	}
	return nil
}

func describe(info fs.FileInfo, owner *syscall.Stat_t) string {
	if owner == nil {
		return info.Mode().String()
	}
	return fmt.Sprintf("%s of uid %d", info.Mode(), owner.Uid)
}
