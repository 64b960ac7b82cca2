package main

import (
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// writeManPages writes one section-8 page for each verb. The date is fixed, so
// that equal programs give equal pages.
func writeManPages(root *cobra.Command, dir string) error {
	root.DisableAutoGenTag = true
	date := time.Unix(0, 0).UTC()
	return doc.GenManTree(root, &doc.GenManHeader{Title: "LAYERCTL", Section: "8", Source: "layerctl", Date: &date}, dir)
}
