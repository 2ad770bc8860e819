// Command descriptors writes the published descriptor of CSI to standard output, as one binary
// google.protobuf.FileDescriptorProto without source positions. tests/contract compares proto/csi.proto with it.
package main

import (
	"log"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
)

func main() {
	log.SetFlags(0)
	file := protodesc.ToFileDescriptorProto(csi.File_csi_proto)
	out, err := proto.MarshalOptions{Deterministic: true}.Marshal(file)
	if err != nil {
		log.Fatalf("descriptors: %v", err)
	}
	if _, err := os.Stdout.Write(out); err != nil {
		log.Fatalf("descriptors: %v", err)
	}
}
