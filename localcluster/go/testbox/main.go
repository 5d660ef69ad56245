// Program of the pods in the local cluster's tests. Its commands cover every way in which a container can end.
//
// Usage: testbox COMMAND [ARGUMENTS]; commands may be chained with "--".
//
//	exit N                end with that exit code
//	print N MS            print "line 1" to "line N", one every MS milliseconds
//	sleep SECONDS         sleep and ignore SIGTERM
//	graceful CODE         wait for SIGTERM, print a line, exit with CODE
//	allocate MIB          allocate MIB of memory, then sleep for ever
//	say FILE TEXT         write TEXT to FILE
//	lookup NAME SECONDS   resolve NAME, retry for SECONDS; print the addresses
//	serve PORT            answer every HTTP request with the host name
//	get URL SECONDS       fetch URL, retry for SECONDS; print the body
//	api PATH SECONDS      fetch PATH from the API server as the pod's service account; print the HTTP status
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func number(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil {
		fail("not a number: %s", text)
	}
	return n
}

func fail(format string, arguments ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", arguments...)
	os.Exit(3)
}

// retry calls try every 100 ms until try succeeds or the time is over.
func retry(seconds string, try func() (string, error)) {
	deadline := time.Now().Add(time.Duration(number(seconds)) * time.Second)
	for {
		text, err := try()
		if err == nil {
			fmt.Println(text)
			return
		}
		if time.Now().After(deadline) {
			fail("%v", err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func get(url string) (string, error) {
	client := http.Client{Timeout: 2 * time.Second}
	answer, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	return string(body), err
}

const account = "/var/run/secrets/kubernetes.io/serviceaccount/"

func api(path string) (string, error) {
	token, err := os.ReadFile(account + "token")
	if err != nil {
		return "", err
	}
	authority, err := os.ReadFile(account + "ca.crt")
	if err != nil {
		return "", err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(authority)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	client := http.Client{Timeout: 2 * time.Second, Transport: transport}
	request, err := http.NewRequest("GET", "https://kubernetes.default.svc"+path, nil)
	if err != nil {
		return "", err
	}
	request.Header.Set("Authorization", "Bearer "+string(token))
	answer, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	return answer.Status, nil
}

func lookup(name string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupHost(ctx, name)
	return strings.Join(addresses, " "), err
}

func allocate(mib int) {
	held := make([][]byte, 0, mib)
	for range mib {
		block := make([]byte, 1<<20)
		for i := 0; i < len(block); i += 4096 {
			block[i] = 1
		}
		held = append(held, block)
	}
	fmt.Println("allocated", len(held), "MiB")
	select {}
}

func graceful(code int) {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	fmt.Println("waiting")
	<-stop
	fmt.Println("got SIGTERM")
	os.Exit(code)
}

func serve(port string) {
	host, _ := os.Hostname()
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, host) })
	fail("%v", http.ListenAndServe(":"+port, handler))
}

func run(words []string) {
	switch words[0] {
	case "exit":
		os.Exit(number(words[1]))
	case "print":
		for i := range number(words[1]) {
			fmt.Println("line", i+1)
			time.Sleep(time.Duration(number(words[2])) * time.Millisecond)
		}
	case "sleep":
		signal.Ignore(syscall.SIGTERM)
		time.Sleep(time.Duration(number(words[1])) * time.Second)
	case "graceful":
		graceful(number(words[1]))
	case "allocate":
		allocate(number(words[1]))
	case "say":
		if err := os.WriteFile(words[1], []byte(words[2]), 0o644); err != nil {
			fail("%v", err)
		}
	case "lookup":
		retry(words[2], func() (string, error) { return lookup(words[1]) })
	case "serve":
		serve(words[1])
	case "get":
		retry(words[2], func() (string, error) { return get(words[1]) })
	case "api":
		retry(words[2], func() (string, error) { return api(words[1]) })
	default:
		fail("unknown command %q", words[0])
	}
}

func main() {
	command := []string{}
	for _, word := range append(os.Args[1:], "--") {
		if word != "--" {
			command = append(command, word)
			continue
		}
		if len(command) > 0 {
			run(command)
		}
		command = command[:0]
	}
}
