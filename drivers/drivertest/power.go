package drivertest

var powerCases []testCase
