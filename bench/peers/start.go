package main

import "os"

var startWorkload = workload{
	name:  "start",
	about: "Start the program and end it: `layerctl version`, and a program that does nothing.",
	subjects: []subject{
		{name: "layerctl", run: func(string) error { return command(*program, "version") }, missing: func() string {
			if _, err := os.Stat(*program); err != nil {
				return err.Error()
			}
			return ""
		}},
		{name: "true", run: func(string) error { return command("true") }},
	},
}
