//! What a container runs on this machine: the command that stands for its image, its arguments and its
//! environment, as Kubernetes would expand them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, EnvVar, Probe, Service};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::objects::{ObjectName, Objects};
use super::state::{ClusterState, PodState};
use super::topology::{Cluster, ImageCommand, glob_matches};

/// A container as a local process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContainerProcess {
    pub(crate) name: String,
    pub(crate) argv: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    /// TCP ports that must listen before the container counts as ready.
    pub(crate) ports: Vec<u16>,
}

/// What the containers of a pod run.
///
/// # Errors
/// What is missing in the topology or the manifest, and where.
pub(crate) fn processes(
    pod: &PodState,
    cluster: &Cluster,
    state: &ClusterState,
    images: &[ImageCommand],
    volumes: &Path,
) -> Result<Vec<ContainerProcess>, String> {
    let base = pod_env(pod, cluster, state);
    let containers = pod.spec.containers.iter();
    containers
        .map(|container| {
            let at = |problem: String| format!("pod {}, container {}: {problem}", pod.name, container.name);
            let env = container_env(container, &base, pod, &state.objects).map_err(at)?;
            let argv = argv(container, &env, pod, images, volumes).map_err(at)?;
            Ok(ContainerProcess { name: container.name.clone(), argv, env, ports: ports(container) })
        })
        .collect()
}

/// What every process in a pod finds in its environment: who it is, and the services of its namespace.
pub(crate) fn pod_env(pod: &PodState, cluster: &Cluster, state: &ClusterState) -> BTreeMap<String, String> {
    let ips: Vec<String> = pod.ips.iter().map(ToString::to_string).collect();
    let mut env = BTreeMap::from([
        ("POD_NAME".to_owned(), pod.name.name.clone()),
        ("POD_NAMESPACE".to_owned(), pod.name.namespace.clone()),
        ("POD_IP".to_owned(), ips.first().cloned().unwrap_or_default()),
        ("POD_IPS".to_owned(), ips.join(",")),
        ("NODE_NAME".to_owned(), pod.node.clone()),
        ("CLUSTER_NAME".to_owned(), cluster.name.to_string()),
        ("HOSTNAME".to_owned(), pod.name.name.clone()),
    ]);
    for (name, service) in &state.objects.services {
        if name.namespace == pod.name.namespace {
            env.extend(service_env(name, service, state));
        }
    }
    env
}

/// Writes the files of the pod's ConfigMap volumes under `volumes`.
///
/// # Errors
/// If a ConfigMap is missing or a file cannot be written.
pub(crate) fn write_volumes(pod: &PodState, objects: &Objects, volumes: &Path) -> Result<(), String> {
    for volume in pod.spec.volumes.iter().flatten() {
        let Some(source) = &volume.config_map else { continue };
        let name = ObjectName::new(&pod.name.namespace, &source.name);
        let map = match objects.config_maps.get(&name) {
            Some(map) => map,
            None if source.optional == Some(true) => continue,
            None => {
                return Err(format!(
                    "pod {}: volume {}: there is no ConfigMap {name}",
                    pod.name, volume.name
                ));
            }
        };
        let dir = volume_dir(volumes, &volume.name)?;
        std::fs::create_dir_all(&dir).map_err(|e| format!("cannot create {}: {e}", dir.display()))?;
        for (key, value) in map.data.iter().flatten() {
            let file = match &source.items {
                None => Some(key),
                Some(items) => items.iter().find(|i| i.key == *key).map(|i| &i.path),
            };
            let Some(file) = file else { continue };
            let path = dir.join(plain_file_name(file)?);
            std::fs::write(&path, value).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        }
    }
    Ok(())
}

fn argv(
    container: &Container,
    env: &BTreeMap<String, String>,
    pod: &PodState,
    images: &[ImageCommand],
    volumes: &Path,
) -> Result<Vec<String>, String> {
    let image = container.image.as_deref().unwrap_or_default();
    // As in Kubernetes: `command` replaces the image's entry point, `args` are appended to it.
    let mut argv: Vec<String> = match &container.command {
        Some(command) if !command.is_empty() => {
            command.iter().map(|word| expand(word, env, "$(", ')')).collect()
        }
        _ => {
            let local = images.iter().find(|i| glob_matches(&i.image, image)).ok_or_else(|| {
                format!(
                    "no entry of `images` in the topology matches image {image:?}; add \
                     {{image: \"{image}\", command: [...]}} or give the container a command"
                )
            })?;
            let mut known = env.clone();
            for volume in pod.spec.volumes.iter().flatten() {
                let dir = volume_dir(volumes, &volume.name)?;
                known.insert(format!("VOLUME_{}", shell_name(&volume.name)), dir.display().to_string());
            }
            local.command.iter().map(|word| expand(word, &known, "${", '}')).collect()
        }
    };
    argv.extend(container.args.iter().flatten().map(|word| expand(word, env, "$(", ')')));
    Ok(argv)
}

fn container_env(
    container: &Container,
    base: &BTreeMap<String, String>,
    pod: &PodState,
    objects: &Objects,
) -> Result<BTreeMap<String, String>, String> {
    let mut env = base.clone();
    for variable in container.env.iter().flatten() {
        let value = match &variable.value_from {
            None => Some(expand(variable.value.as_deref().unwrap_or_default(), &env, "$(", ')')),
            Some(_) => value_from(variable, base, pod, objects)?,
        };
        if let Some(value) = value {
            env.insert(variable.name.clone(), value);
        }
    }
    Ok(env)
}

fn value_from(
    variable: &EnvVar,
    base: &BTreeMap<String, String>,
    pod: &PodState,
    objects: &Objects,
) -> Result<Option<String>, String> {
    let name = &variable.name;
    let source = variable.value_from.clone().unwrap_or_default();
    if let Some(field) = source.field_ref {
        let known = match field.field_path.as_str() {
            "metadata.name" => "POD_NAME",
            "metadata.namespace" => "POD_NAMESPACE",
            "spec.nodeName" => "NODE_NAME",
            "status.podIP" => "POD_IP",
            "status.podIPs" => "POD_IPS",
            "metadata.uid" => return Ok(Some(pod.uid.clone())),
            other => return Err(format!("env {name}: a lab does not know the field {other}")),
        };
        return Ok(base.get(known).cloned());
    }
    if let Some(key) = source.config_map_key_ref {
        let map = ObjectName::new(&pod.name.namespace, &key.name);
        let value = objects.config_maps.get(&map).and_then(|m| m.data.as_ref()?.get(&key.key).cloned());
        return match value {
            None if key.optional != Some(true) => {
                Err(format!("env {name}: ConfigMap {map} has no key {}", key.key))
            }
            value => Ok(value),
        };
    }
    Err(format!("env {name}: a lab knows valueFrom.fieldRef and valueFrom.configMapKeyRef only"))
}

/// `ORDERS_SERVICE_HOST` and `ORDERS_SERVICE_PORT`, as kubelet sets them.
fn service_env(name: &ObjectName, service: &Service, state: &ClusterState) -> Vec<(String, String)> {
    let Some(ip) = state.cluster_ips.get(name).and_then(|ips| ips.first()) else { return Vec::new() };
    let ports = service.spec.as_ref().and_then(|s| s.ports.as_ref());
    let prefix = shell_name(&name.name);
    let mut env = vec![(format!("{prefix}_SERVICE_HOST"), ip.to_string())];
    if let Some(first) = ports.and_then(|p| p.first()) {
        env.push((format!("{prefix}_SERVICE_PORT"), first.port.to_string()));
    }
    for port in ports.into_iter().flatten() {
        if let Some(port_name) = &port.name {
            env.push((format!("{prefix}_SERVICE_PORT_{}", shell_name(port_name)), port.port.to_string()));
        }
    }
    env
}

/// Declared TCP ports, and the ports of the probes: many published manifests have only those.
fn ports(container: &Container) -> Vec<u16> {
    let declared: Vec<_> = container.ports.iter().flatten().collect();
    let mut ports: Vec<u16> = declared
        .iter()
        .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP")
        .filter_map(|port| u16::try_from(port.container_port).ok())
        .collect();
    let probed = |probe: &Probe| {
        let port = match (&probe.http_get, &probe.tcp_socket) {
            (Some(http), _) => &http.port,
            (_, Some(tcp)) => &tcp.port,
            _ => return None,
        };
        let number = match port {
            IntOrString::Int(number) => Some(*number),
            IntOrString::String(name) => {
                declared.iter().find(|p| p.name.as_ref() == Some(name)).map(|p| p.container_port)
            }
        };
        number.and_then(|n| u16::try_from(n).ok())
    };
    ports.extend(container.readiness_probe.iter().filter_map(probed));
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Replaces references to known variables; unknown ones stay as they are, as in Kubernetes.
fn expand(text: &str, env: &BTreeMap<String, String>, open: &str, close: char) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(open) {
        out.push_str(&rest[..start]);
        let name = &rest[start + open.len()..];
        match name.find(close).and_then(|end| env.get(&name[..end]).map(|value| (end, value))) {
            Some((end, value)) => {
                out.push_str(value);
                rest = &name[end + close.len_utf8()..];
            }
            None => {
                out.push_str(open);
                rest = name;
            }
        }
    }
    out + rest
}

fn shell_name(name: &str) -> String {
    name.to_ascii_uppercase().replace(['-', '.'], "_")
}

fn volume_dir(volumes: &Path, name: &str) -> Result<PathBuf, String> {
    plain_file_name(name).map(|name| volumes.join(name))
}

/// A ConfigMap's file names come from manifests: none may lead out of the volume.
fn plain_file_name(name: &str) -> Result<&str, String> {
    if name.is_empty() || name.contains('/') || name.starts_with("..") {
        return Err(format!("{name:?}: in a lab, files of a ConfigMap volume have no directories"));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::testing;

    fn run(pod: &str, images: &[(&str, &[&str])]) -> Result<Vec<ContainerProcess>, String> {
        let images: Vec<ImageCommand> = images
            .iter()
            .map(|(image, command)| ImageCommand {
                image: (*image).to_owned(),
                command: command.iter().map(ToString::to_string).collect(),
            })
            .collect();
        let topology = testing::topology();
        let state = testing::cluster_state(testing::SERVICES);
        let pod = testing::pod_state(pod);
        processes(&pod, &topology.clusters[0], &state, &images, Path::new("/v"))
    }

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: orders-0, namespace: shop}
spec:
  volumes: [{name: html, configMap: {name: page}}]
  containers:
  - name: web
    image: docker.io/nginx:1.15.8
    args: ['--who=$(GREETING)', '$(UNKNOWN)', '${POD_NAME}']
    env:
    - {name: GREETING, value: 'hi $(POD_NAME)'}
    - {name: WHERE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    ports: [{containerPort: 80}, {containerPort: 53, protocol: UDP}]
    readinessProbe: {httpGet: {path: /, port: 8080}}
";

    #[test]
    fn images_args_and_env_expand_as_in_kubernetes() {
        let images: &[(&str, &[&str])] =
            &[("*/nginx:*", &["serve", "${CLUSTER_NAME}/${POD_NAME}", "${VOLUME_HTML}"]), ("*", &["never"])];
        let [web] = &run(POD, images).unwrap()[..] else { panic!("one container") };
        assert_eq!(
            web.argv,
            ["serve", "alpha/orders-0", "/v/html", "--who=hi orders-0", "$(UNKNOWN)", "${POD_NAME}"]
        );
        assert_eq!(web.env["WHERE"], "node1");
        assert_eq!(web.env["ORDERS_SERVICE_HOST"], "10.101.0.20");
        assert_eq!(web.env["ORDERS_SERVICE_PORT_HTTP"], "80");
        assert_eq!(web.ports, [80, 8080]);
    }

    #[test]
    fn a_command_replaces_the_image() {
        let pod = POD.replace("    args:", "    command: [sleep, '9']\n    args:");
        assert_eq!(run(&pod, &[]).unwrap()[0].argv[..2], ["sleep", "9"]);
    }

    #[test]
    fn an_unknown_image_says_what_to_add() {
        let error = run(POD, &[("redis", &["x"])]).unwrap_err();
        assert!(error.contains("docker.io/nginx:1.15.8") && error.contains("images"), "{error}");
    }
}
