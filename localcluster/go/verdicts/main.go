// Judges Kubernetes objects as GitOps tools do: with the kstatus library of Flux and Helm, and with a health script of Argo CD.
//
// Usage: verdicts HEALTH.LUA < OBJECTS. Each line of the input is an object in JSON. Each line of the output has the status of kstatus, and the
// status and message that the script returns, in JSON.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

type verdict struct {
	Kstatus string `json:"kstatus"`
	Argo    string `json:"argo"`
	Message string `json:"message"`
}

func main() {
	script, err := os.ReadFile(os.Args[1])
	check(err)
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 16<<20)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var object map[string]any
		check(json.Unmarshal(lines.Bytes(), &object))
		result, err := status.Compute(&unstructured.Unstructured{Object: integers(object).(map[string]any)})
		check(err)
		health, message, err := argoHealth(string(script), object)
		check(err)
		check(out.Encode(verdict{result.Status.String(), health, message}))
	}
	check(lines.Err())
}

// argoHealth runs a health script like Argo CD: the global `obj` is the object, and only these libraries exist.
func argoHealth(script string, object map[string]any) (string, string, error) {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for _, library := range []struct {
		name string
		open lua.LGFunction
	}{{lua.BaseLibName, lua.OpenBase}, {lua.TabLibName, lua.OpenTable}, {lua.StringLibName, lua.OpenString}} {
		state.Push(state.NewFunction(library.open))
		state.Push(lua.LString(library.name))
		state.Call(1, 0)
	}
	state.SetGlobal("obj", value(state, object))
	if err := state.DoString(script); err != nil {
		return "", "", err
	}
	table, ok := state.Get(-1).(*lua.LTable)
	if !ok {
		return "", "", fmt.Errorf("the script returned %s, not a table", state.Get(-1).Type())
	}
	return lua.LVAsString(table.RawGetString("status")), lua.LVAsString(table.RawGetString("message")), nil
}

// value converts a JSON value to a Lua value.
func value(state *lua.LState, item any) lua.LValue {
	switch typed := item.(type) {
	case string:
		return lua.LString(typed)
	case float64:
		return lua.LNumber(typed)
	case int64:
		return lua.LNumber(typed)
	case bool:
		return lua.LBool(typed)
	case []any:
		table := state.NewTable()
		for _, element := range typed {
			table.Append(value(state, element))
		}
		return table
	case map[string]any:
		table := state.NewTable()
		for key, element := range typed {
			table.RawSetString(key, value(state, element))
		}
		return table
	}
	return lua.LNil
}

// integers converts whole numbers to int64, as Kubernetes' JSON decoder does.
func integers(item any) any {
	switch typed := item.(type) {
	case float64:
		if typed == float64(int64(typed)) {
			return int64(typed)
		}
	case []any:
		for index, element := range typed {
			typed[index] = integers(element)
		}
	case map[string]any:
		for key, element := range typed {
			typed[key] = integers(element)
		}
	}
	return item
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "verdicts:", err)
		os.Exit(1)
	}
}
