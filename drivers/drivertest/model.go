package drivertest

var modelCases []testCase
